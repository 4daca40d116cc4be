"""Training reads no weight outside the forward or backward pass of its unit.

Each unit is a decoder layer, the embedding, the final norm, the output head, and for images each
layer of the vision tower and the projector. Outside its unit a weight is empty (see `gathering`).
"""

import importlib.util
from dataclasses import replace
from functools import partial

import pytest
import torch
from gathering import Gathered, nothing_gathered, units_of
from trainer_parts import random_batch

from xtuner.config.schema import Settings
from xtuner.kernels import compiled
from xtuner.kernels.attention import packed as attention
from xtuner.kernels.fused import decoder
from xtuner.models import prepare
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.vision import llava
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_vision_tower
from xtuner.types import BatchImages

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")
HAS_FOLDER = importlib.util.find_spec("xtuner.kernels.cpu") is not None


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3}
    return tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", **sizes, **heads)


@pytest.fixture(params=["compiled", "plain"])
def way(request, monkeypatch):
    """With the compiled CPU kernels, and without."""
    if request.param == "compiled":
        if not compiled.has_products():
            pytest.skip("no bfloat16 vectors here, or no compiler")
    elif HAS_FOLDER:
        from xtuner.kernels.cpu import bindings, build

        def forget():
            for known in (build.library, build.has_products, bindings._kernels):
                known.cache_clear()

        monkeypatch.setenv("XTUNER_COMPILE", "0")
        forget()
        request.addfinalizer(forget)
    return request.param


@pytest.fixture
def fused_passes(monkeypatch):
    """How often a decoder layer ran as one operation."""
    count = []
    apply = decoder._DecoderLayer.apply
    monkeypatch.setattr(
        decoder._DecoderLayer, "apply", lambda *given: (count.append(1), apply(*given))[1]
    )
    return count


def trainable(model_path, tuning, *, recompute, **changes):
    settings = Settings(
        pretrained_model_name_or_path=str(model_path), data_path=("unused",), tuning=tuning,
        lora_r=4, **changes,
    )  # fmt: skip
    model = prepare.make_trainable(
        settings, dtype=torch.bfloat16, device="cpu", recompute=recompute
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # as after some steps
            parameter.data = 0.05 * torch.randn_like(parameter)
    mixed = tuning == "full" or changes.get("lora_modules_to_save")
    return PackedCausalLM(model, autocast=torch.bfloat16 if mixed else None).train()


def loss_and_gradients(model, batch, around):
    """For the summed loss, and for one that weights tokens differently, as algorithms may."""
    model.zero_grad(set_to_none=True)
    losses = []
    with around(units_of(model)) as gathered:
        for weigh in (torch.ones_like, lambda x: torch.linspace(0.5, 2, len(x))):
            torch.manual_seed(7)  # dropout
            scores = model(batch)
            loss = -(scores * weigh(scores.detach())).sum()
            gathered.backward(loss)
            losses.append(float(loss.detach()))
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, gathered


def assert_same(model, batch, unused=(), gather=Gathered):
    losses, gradients, _ = loss_and_gradients(model, batch, nothing_gathered)
    found_losses, found, gathered = loss_and_gradients(model, batch, gather)
    assert found_losses == losses
    lacking = [n for n, grad in gradients.items() if grad is None or not grad.abs().sum()]
    assert [name for name in lacking if not any(part in name for part in unused)] == []
    different = [n for n in {*gradients} - {*lacking} if not torch.equal(found[n], gradients[n])]
    assert not different
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    units = zip(gathered.units, gathered.entered, strict=True)
    idle = [names[id(unit)] for unit, count in units if count < 2]
    kept = ("original_module", *unused)  # PEFT keeps what it trains a copy of
    assert [name for name in idle if not any(part in name for part in kept)] == []


TUNINGS = {
    "full": {},
    "lora": {"lora_dropout": 0.0},
    "lora with dropout": {"lora_dropout": 0.1},
    "lora and a trained head": {"lora_modules_to_save": ("embed_tokens", "lm_head")},
    "qlora": {},
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", TUNINGS)
def test_weights_are_read_only_inside_their_unit(name, recompute, way, model_path, fused_passes):
    model = trainable(model_path, name.split()[0], recompute=recompute, **TUNINGS[name])
    assert_same(model, random_batch(30, 11, 7))
    fuses = way == "compiled" and name in ("lora", "qlora") and not recompute
    assert len(fused_passes) == (2 * 2 * 3 if fuses else 0)


def test_the_check_at_the_start_enters_through_forward(model_path, way):
    model = trainable(model_path, "lora", recompute=False)
    with Gathered(units_of(model)):
        assert model.verify() is None


def test_samples_that_go_through_the_model_one_at_a_time(model_path):
    model = trainable(model_path, "lora", recompute=False)
    model.apart = True
    model.causal.set_attn_implementation("sdpa")
    assert_same(model, random_batch(30, 11, 7))


def test_heads_that_are_more_than_one_matrix(model_path):
    model = trainable(model_path, "lora", recompute=False)
    model.plain_logits = True
    assert_same(model, random_batch(30, 11, 7))


def test_a_weight_that_is_read_past_its_unit_is_caught(model_path):
    model = trainable(model_path, "lora", recompute=False)
    head = model.causal.get_output_embeddings()
    with Gathered(units_of(model)), pytest.raises(RuntimeError):
        torch.nn.functional.linear(model.hidden_states(random_batch(16)), head.weight)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tower", ["frozen", "trained"])
def test_layers_of_the_vision_tower_and_the_projector_are_units(tower, recompute, model_path):
    llm = prepare.load_model(model_path, dtype=torch.float32)
    llm.set_attn_implementation(attention.register())
    for parameter in llm.parameters():
        parameter.requires_grad_(False)
    joined = llava.assemble(llm, tiny_vision_tower(), image_token_id=261)
    trained = tower == "trained"
    joined.model.vision_tower.requires_grad_(trained)
    model = PackedCausalLM(joined, embedder=llava.LlavaEmbedder(joined, train_encoder=trained))
    if recompute:
        joined.gradient_checkpointing_enable({"use_reentrant": False})
        llm.enable_input_require_grads()
    batch = random_batch(30, 34)
    places = torch.zeros(1, 64, dtype=torch.bool)
    places[0, 3:7] = places[0, 40:44] = True
    pixels = torch.linspace(-1, 1, 2 * 3 * 28 * 28).sin().view(2, 3, 28, 28)
    images = BatchImages(
        tuple(pixels), places, sizes=((28, 28),) * 2, counts=(1, 1), features=(None, None)
    )
    labels = batch.labels.masked_fill(places, -100)
    unused = ("post_layernorm", "layers.2.")  # after the layer whose features are used
    batch = replace(batch, labels=labels, images=images)
    assert_same(model.train(), batch, unused=unused, gather=partial(Gathered, on_outputs=True))
