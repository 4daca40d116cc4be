"""The memory of a step, found on shapes alone, against the same step on real tensors."""

import itertools

import pytest
import torch
from losses import loss_of

from xtuner.kernels.attention import packed as attention
from xtuner.kernels.compiled import has_products
from xtuner.kernels.fused import norm_mlp
from xtuner.memory import footprint
from xtuner.memory.live_bytes import LiveBytes
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.load import load_model
from xtuner.testing.tiny import tiny_model_folder
from xtuner.types import Batch

LENGTHS = (300, 150, 70)
LORA = {"r": 8, "alpha": 16, "dropout": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(
        tmp_path_factory.mktemp("model"), num_hidden_layers=7, hidden_size=64, intermediate_size=128
    )


def real_peak(folder, *, lora, recompute, dtype, autocast, accumulate):
    attention.register()
    model = load_model(folder, dtype=dtype, attn_implementation=attention.NAME)
    norm_mlp.install(model)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora:
        model = adapters.add_adapter(model, **lora)
    model.train()
    ids = torch.arange(sum(LENGTHS))[None] % 200
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    batch = Batch(ids, ids.clone(), positions, cu_seqlens)
    packed = PackedCausalLM(model, autocast=autocast)
    if accumulate:
        loss_of(packed, batch).backward()
    earlier = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    with footprint._caches_apart():
        counter = LiveBytes()
        with counter:
            loss_of(packed, batch).backward()
    return max(counter.history) + earlier, model


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("lora", "recompute", "dtype", "autocast"),
    [
        (LORA, False, torch.bfloat16, None),
        ({**LORA, "dropout": 0.0}, False, torch.bfloat16, None),
        (LORA, True, torch.bfloat16, None),
        ({**LORA, "dropout": 0.0}, True, torch.bfloat16, None),
        (None, False, torch.float32, None),
        (None, True, torch.float32, torch.bfloat16),
        (LORA, False, torch.float16, None),
        (None, False, torch.float32, torch.float16),
    ],
    ids=[
        "lora",
        "lora without dropout",
        "lora recomputed",
        "lora without dropout, recomputed",
        "full",
        "full recomputed, autocast",
        "lora float16",
        "full, autocast float16",
    ],
)
def test_equals_the_real_step(folder, lora, recompute, dtype, autocast, accumulate):
    how = {"lora": lora, "recompute": recompute, "dtype": dtype, "autocast": autocast}
    how["accumulate"] = accumulate
    found = footprint.measure(str(folder), tokens=LENGTHS, **how)
    peak, model = real_peak(folder, **how)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert abs(found.step - peak) < 0.05 * peak


def test_few_layers_tell_of_all(folder, monkeypatch):
    def measured():
        return footprint.measure(str(folder), tokens=LENGTHS, dtype=torch.bfloat16, lora=LORA)

    quick = measured()
    monkeypatch.setattr(footprint, "FEW_LAYERS", (7, 8))
    whole = measured()
    assert quick.weights == whole.weights and quick.parameters == whole.parameters
    assert abs(quick.step - whole.step) < 0.01 * whole.step


def test_quantised_weights_take_what_they_take(folder):
    found = footprint.measure(
        str(folder), tokens=(64,), dtype=torch.bfloat16, quantization="nf4", lora=LORA
    )
    model = load_model(folder, dtype=torch.bfloat16, quantization="nf4")
    real = 0
    for name, tensor in model.state_dict().items():
        real += 0 if "quant_map" in name or "quant_state" in name else tensor.nbytes
    adapter = found.gradients
    assert abs(found.weights - adapter - real) < 0.05 * real


@pytest.mark.skipif(not has_products(), reason="no bfloat16 vectors here, or no compiler")
@pytest.mark.parametrize(
    ("changes", "largest"),
    [
        ({}, 0),
        ({"dropout": 0.1}, 64 * 128),
        ({"target_modules": ["q_proj", "v_proj"]}, 64 * 128),
    ],
    ids=["compiled functions read them", "dropout", "layers without adapters"],
)
def test_room_for_a_weight_that_is_dequantised(tmp_path, changes, largest):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
    folder = tiny_model_folder(tmp_path, num_hidden_layers=7, num_key_value_heads=1, **sizes)
    lora = {**LORA, "dropout": 0.0, **changes}
    quantised, plain = (
        footprint.measure(
            str(folder), tokens=(64,), dtype=torch.bfloat16, quantization=kind, lora=lora
        ).step
        for kind in ("nf4", "none")
    )
    assert quantised - plain == 2 * largest


def test_nothing_without_values_stays_in_a_cache(folder):
    footprint.measure(str(folder), tokens=(64,), dtype=torch.bfloat16, lora=LORA)
    from xtuner.kernels.attention.blocks import block_attention

    x = torch.randn(64, 2, 8)
    assert float(block_attention(x, x, x, (0, 64), scale=1.0).sum()) != 0


@pytest.mark.parametrize("architecture", ["qwen3", "olmo2", "exaone4"])
@pytest.mark.parametrize("flash", [False, True], ids=["cpu", "gpu"])
def test_norms_of_queries_and_keys_whatever_they_span(tmp_path, architecture, flash):
    """Qwen3 norms each head, OLMo2 all heads at once; under autocast both give float32."""
    folder = tiny_model_folder(tmp_path, architecture)
    found = footprint.measure(
        str(folder),
        tokens=(64, 64),
        dtype=torch.float32,
        autocast=torch.bfloat16,
        flash=flash,
    )
    assert found.step > found.gradients > 0


def test_the_workspace_of_the_loss_does_not_stay_on_a_gpu(tmp_path):
    """It would be alive at the peak of the backward pass, whatever the size of the vocabulary."""

    def peak(vocabulary):
        sizes = {"vocab_size": vocabulary, "intermediate_size": 8192}
        folder = tiny_model_folder(tmp_path / str(vocabulary), **sizes)
        lora = {**LORA, "dropout": 0.0}
        options = {"dtype": torch.bfloat16, "lora": lora, "flash": True}
        return footprint.measure(str(folder), tokens=(1024,), **options).step

    # 1,024 rows of 2,048 more logits in 16 and 32 bits are 12 MiB; a layer's backward takes more
    assert abs(peak(2309) - peak(261)) < 2**18


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}),
        ("llama", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
    ],
    ids=["dynamic", "linear", "longrope"],
)
def test_rotations_that_depend_on_lengths_need_no_values(tmp_path, architecture, rope):
    """InternLM2, the course's own model, has the type 'dynamic'."""
    plain, scaled = (
        footprint.measure(
            str(tiny_model_folder(tmp_path / name, architecture, rope_parameters=parameters)),
            tokens=(64, 64),
            dtype=torch.float32,
            lora={"r": 4, "alpha": 8} if architecture == "llama" else None,
        )
        for name, parameters in (("plain", {"rope_type": "default", "rope_theta": 1e4}),
                                 ("scaled", rope))
    )  # fmt: skip
    assert scaled == plain


def test_internlm2_as_the_course_has_it(tmp_path):
    from xtuner.models.families import internlm2

    internlm2.register()
    scaling = {"type": "dynamic", "factor": 2.0}
    folder = tiny_model_folder(tmp_path, "internlm2", rope_scaling=scaling)
    assert footprint.measure(str(folder), tokens=(64, 64), dtype=torch.float32).step > 0
