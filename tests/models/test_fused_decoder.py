"""A decoder layer as one operation, against transformers and peft in float64."""

import copy

import pytest
import torch

from xtuner.models import (
    adapters,
    attention,
    cpu_kernels,
    fused_attention,
    fused_decoder,
    fused_layers,
)
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.testing.tiny import tiny_model
from xtuner.types import Batch

pytestmark = [
    pytest.mark.usefixtures("units"),
    pytest.mark.skipif(
        not cpu_kernels._has_products(), reason="no bfloat16 vectors here, or no compiler"
    ),
]


def batch_of(*lengths):
    torch.manual_seed(5)
    count = sum(lengths)
    ids = torch.randint(0, 90, (1, count))
    labels = ids.clone()
    labels[0, ::3] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels[0, borders[:-1].long()] = -100
    return Batch(ids, labels, positions, borders)


def changed_model(model_type="llama", **changes):
    model = tiny_model(
        model_type, hidden_size=64, intermediate_size=96, **{"head_dim": 32} | changes
    )
    model = model.bfloat16()
    model.set_attn_implementation(attention.register())
    fused_layers.install(model)
    fused_attention.install(model)
    return model, fused_decoder.install(model)


def with_adapters(model, **options):
    """With adapters whose B is not zero, as after some steps."""
    adapted = adapters.add_adapter(model, **{"r": 4, "alpha": 8, **options})
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn_like(parameter)
    return adapted.train()


def gradients(model, loss):
    names, parameters = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def plain_copy(adapted):
    """The same weights in float64, in layers of transformers and peft as they are."""
    plain = with_adapters(
        tiny_model("llama", **{k: getattr(adapted.config, k) for k in KEPT}).double()
    )
    plain.set_attn_implementation("eager")
    for (name, ours), (other, theirs) in zip(
        adapted.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        theirs.data = ours.data.double()
    return plain


KEPT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "head_dim"),
)


@pytest.fixture
def passes(monkeypatch):
    """How often a whole layer was one operation."""
    count = []
    apply = fused_decoder._DecoderLayer.apply

    def counted(*arguments):
        count.append(1)
        return apply(*arguments)

    monkeypatch.setattr(fused_decoder._DecoderLayer, "apply", counted)
    return count


@pytest.mark.parametrize("lengths", [(40, 17, 7), (64,)])
def test_loss_and_gradients_are_those_of_plain_layers(lengths, passes):
    model, count = changed_model()
    layers = model.config.num_hidden_layers
    assert count == layers
    adapted, batch = with_adapters(model), batch_of(*lengths)
    loss = PackedCausalLM(adapted).supervised_loss(batch)
    found = gradients(adapted, loss)
    assert len(passes) == layers

    plain, exact = plain_copy(adapted), 0.0
    for sample in batch.split():
        logits = plain(input_ids=sample.input_ids).logits[0, :-1]
        exact = exact + torch.nn.functional.cross_entropy(
            logits, sample.labels[0, 1:], reduction="sum"
        )
    assert abs(loss.item() - exact.item()) < 5e-3 * exact.item()
    wanted = gradients(plain, exact)
    for name, grad in found.items():
        apart = (grad.double() - wanted[name]).norm() / wanted[name].norm()
        assert apart < 0.04, name


def test_it_is_nearer_than_the_same_layer_part_by_part(monkeypatch, passes):
    model, _ = changed_model()
    adapted, batch = with_adapters(model), batch_of(40, 24)
    wrapped = PackedCausalLM(adapted)
    whole = gradients(adapted, wrapped.supervised_loss(batch))
    assert passes
    monkeypatch.setattr(fused_decoder, "_layer_of", lambda *_: None)
    parts = gradients(adapted, wrapped.supervised_loss(batch))
    plain = plain_copy(adapted)
    exact = sum(
        torch.nn.functional.cross_entropy(
            plain(input_ids=s.input_ids).logits[0, :-1], s.labels[0, 1:], reduction="sum"
        )
        for s in batch.split()
    )
    wanted = gradients(plain, exact)

    def error(found):
        return sum((found[n].double() - w).norm() / w.norm() for n, w in wanted.items())

    assert error(whole) < 1.1 * error(parts)


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"target_modules": ["q_proj", "v_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_other_adapters(options, passes):
    adapted = with_adapters(changed_model()[0], **options)
    wrapped = PackedCausalLM(adapted, autocast=torch.bfloat16)  # as where the head is trained
    loss = wrapped.supervised_loss(batch_of(20, 12))
    assert all(grad.isfinite().all() for grad in gradients(adapted, loss).values())
    used = "modules_to_save" in options  # the head is no part of a layer
    assert bool(passes) == used


def test_without_gradients_and_with_recomputation_it_goes_part_by_part(passes):
    model, _ = changed_model()
    recomputing = copy.deepcopy(model)
    recomputing.activation_checkpointing_enable({"use_reentrant": False})
    recomputing.enable_input_require_grads()
    batch = batch_of(20, 12)
    with torch.no_grad():
        PackedCausalLM(with_adapters(model)).supervised_loss(batch)
    adapted = with_adapters(recomputing)
    gradients(adapted, PackedCausalLM(adapted).supervised_loss(batch))
    assert not passes


def test_trained_norms_keep_their_gradients(passes):
    adapted = with_adapters(
        changed_model()[0], modules_to_save=["input_layernorm", "post_attention_layernorm"]
    )
    grads = gradients(adapted, PackedCausalLM(adapted).supervised_loss(batch_of(20, 12)))
    norms = [grad for name, grad in grads.items() if "layernorm" in name]
    assert norms and all(grad.abs().sum() > 0 for grad in norms)
    assert not passes


def test_a_layer_that_adds_up_otherwise_stays(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def scaled(self, hidden_states, **kwargs):
        return forward(self, hidden_states, **kwargs) * 0.5

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    assert changed_model()[1] == 0


def test_layers_with_norms_of_heads_stay():
    assert changed_model("qwen3")[1] == 0
    assert changed_model("mistral")[1] > 0
