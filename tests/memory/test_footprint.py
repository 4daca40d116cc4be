"""The memory of a step, measured on meta tensors, against the same step on real tensors."""

import itertools

import pytest
import torch
from losses import loss_of

from xtuner.config.schema import Settings
from xtuner.kernels.compiled import has_products
from xtuner.memory import footprint, step
from xtuner.memory.live_bytes import LiveBytes
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.load import load_model
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.testing.tiny import tiny_model_folder
from xtuner.types import Batch

LENGTHS = (300, 150, 70)
LORA = {"tuning": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
EXACT = {**LORA, "lora_dropout": 0.0}
FULL = {"tuning": "full"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(
        tmp_path_factory.mktemp("model"), num_hidden_layers=7, hidden_size=64, intermediate_size=128
    )


def settings(folder, **changes):
    chosen = {"pretrained_model_name_or_path": str(folder), "data_path": "d", **LORA}
    return Settings(**{**chosen, "accumulative_counts": 1, **changes})


def measure(folder, tokens, *, dtype=torch.bfloat16, device="cpu", recompute=False, **changes):
    chosen = settings(folder, **changes)
    return footprint.measure(chosen, tokens=tokens, dtype=dtype, device=device, recompute=recompute)


def real_peak(chosen, *, recompute, dtype):
    """The model of a run, and the peak memory of a step."""
    model = make_trainable(chosen, dtype=dtype, device="cpu", recompute=recompute)
    ids = torch.arange(sum(LENGTHS))[None] % 200
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    batch = Batch(ids, ids.clone(), positions, cu_seqlens)
    packed = PackedCausalLM(model.train(), autocast=llm_autocast(chosen, dtype))
    if chosen.accumulative_counts > 1:
        loss_of(packed, batch).backward()
    earlier = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    with step._separate_caches():
        counter = LiveBytes()
        with counter:
            loss_of(packed, batch).backward()
    return max(counter.history) + earlier, model


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("changes", "recompute", "dtype"),
    [
        (LORA, False, torch.bfloat16),
        (EXACT, False, torch.bfloat16),
        (LORA, True, torch.bfloat16),
        (EXACT, True, torch.bfloat16),
        (FULL, False, torch.float32),
        (FULL, True, torch.bfloat16),
        (LORA, False, torch.float16),
        (FULL, False, torch.float16),
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
def test_equals_the_real_step(folder, changes, recompute, dtype, accumulate):
    chosen = settings(folder, **changes, accumulative_counts=accumulate)
    how = {"recompute": recompute, "dtype": dtype}
    found = footprint.measure(chosen, tokens=LENGTHS, **how)
    peak, model = real_peak(chosen, **how)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert found.trainable == sum(p.numel() for p in trained)
    assert found.gradients == sum(p.numel() * p.element_size() for p in trained)
    assert found.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    assert abs(found.step - peak) < 0.05 * peak


def test_few_layers_extrapolate_to_all(folder, monkeypatch):
    quick = measure(folder, LENGTHS)
    monkeypatch.setattr(footprint, "FEW_LAYERS", (7, 8))
    full = measure(folder, LENGTHS)
    assert quick.weights == full.weights and quick.parameters == full.parameters
    assert abs(quick.step - full.step) < 0.01 * full.step


def test_quantised_weights_take_their_packed_size(folder):
    found = measure(folder, (64,), tuning="qlora")
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
        ({"lora_dropout": 0.1}, 64 * 128),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, 64 * 128),
    ],
    ids=["compiled functions read them", "dropout", "layers without adapters"],
)
def test_room_for_a_weight_that_is_dequantised(tmp_path, changes, largest):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 2}
    folder = tiny_model_folder(tmp_path, num_hidden_layers=7, num_key_value_heads=1, **sizes)
    quantised, plain = (
        measure(folder, (64,), tuning=tuning, **{"lora_dropout": 0.0, **changes}).step
        for tuning in ("qlora", "lora")
    )
    assert quantised - plain == 2 * largest


def test_nothing_without_values_stays_in_a_cache(folder):
    measure(folder, (64,))
    from xtuner.kernels.attention.blocks import block_attention

    x = torch.randn(64, 2, 8)
    assert float(block_attention(x, x, x, (0, 64), scale=1.0).sum()) != 0


@pytest.mark.parametrize("architecture", ["qwen3", "olmo2", "exaone4"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norms_of_queries_and_keys_whatever_they_span(tmp_path, architecture, device):
    """Qwen3 norms each head, OLMo2 all heads at once; under autocast both give float32."""
    folder = tiny_model_folder(tmp_path, architecture)
    found = measure(folder, (64, 64), device=device, **FULL)
    assert found.step > found.gradients > 0


def test_the_scratch_of_the_loss_does_not_stay_on_a_gpu(tmp_path):
    """It would be alive at the peak of the backward pass, for any vocabulary size."""

    def peak(vocabulary):
        sizes = {"vocab_size": vocabulary, "intermediate_size": 8192}
        folder = tiny_model_folder(tmp_path / str(vocabulary), **sizes)
        return measure(folder, (1024,), device="cuda", lora_dropout=0.0).step

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
        measure(
            tiny_model_folder(tmp_path / name, architecture, rope_parameters=parameters),
            (64, 64),
            dtype=torch.float32,
            **(LORA if architecture == "llama" else FULL),
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
    assert measure(folder, (64, 64), dtype=torch.float32, **FULL).step > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_of_a_row_that_is_split_fall_with_the_processes(folder, device):
    alone, two = (
        measure(
            folder, (256,) * 4, device=device, dtype=torch.float32, **FULL, sequence_parallel_size=n
        )
        for n in (1, 2)
    )
    assert alone.weights == two.weights
    activations = [found.step - found.gradients for found in (alone, two)]
    assert activations[1] == pytest.approx(activations[0] / 2, rel=0.25)
