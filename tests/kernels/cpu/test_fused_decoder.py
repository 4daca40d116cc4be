"""A decoder layer as one operation, against transformers and peft in float64."""

import copy
import ctypes

import pytest
import torch
from losses import loss_of
from trainer_parts import random_batch

from xtuner.kernels.attention import packed
from xtuner.kernels.cpu import build
from xtuner.kernels.cpu.bindings import Kernels
from xtuner.kernels.fused import attention as fused_attention
from xtuner.kernels.fused import decoder, norm_mlp
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.testing.tiny import tiny_model

pytestmark = [
    pytest.mark.usefixtures("units", "guarded"),
    pytest.mark.skipif(not build.has_products(), reason="no bfloat16 vectors here, or no compiler"),
]


def changed_model(model_type="llama", **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 80, "head_dim": 32, "num_attention_heads": 2}
    model = tiny_model(model_type, **{**sizes, "num_key_value_heads": 1, **changes})
    model = model.bfloat16()
    model.set_attn_implementation(packed.register())
    norm_mlp.install(model)
    fused_attention.install(model)
    return model, decoder.install(model)


def with_adapters(model, **options):
    """Add adapters whose B is not zero, as after some training."""
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


def exact_gradients(adapted, batch):
    """Loss and gradients of the same weights in float64 with transformers and peft."""
    config = adapted.get_base_model().config
    fields = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")}
    plain = with_adapters(tiny_model(config.model_type, **fields).double())
    plain.set_attn_implementation("eager")
    for (name, ours), (other, theirs) in zip(
        adapted.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        theirs.data = ours.data.double()
    loss = sum(
        torch.nn.functional.cross_entropy(
            plain(input_ids=sample.input_ids).logits[0, :-1], sample.labels[0, 1:], reduction="sum"
        )
        for sample in batch.split()
    )
    return loss.item(), gradients(plain, loss)


def relative_errors(found, wanted):
    """The error of each gradient relative to its norm, or to a tenth of the median norm, since what
    remains where large terms cancel out is rounding."""
    least = 0.1 * torch.stack([grad.norm() for grad in wanted.values()]).median()
    return {
        name: float((found[name].double() - grad).norm() / max(grad.norm(), least))
        for name, grad in wanted.items()
    }


@pytest.fixture
def passes(monkeypatch):
    """One entry for each call of the fused layer."""
    count = []
    apply = decoder._DecoderLayer.apply

    def counted(*arguments):
        count.append(1)
        return apply(*arguments)

    monkeypatch.setattr(decoder._DecoderLayer, "apply", counted)
    return count


@pytest.mark.parametrize("lengths", [(30, 11, 7), (64,)])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {}),
        ("llama", {"mlp_bias": True}),
    ],
)
def test_loss_and_gradients_are_those_of_plain_layers(model_type, changes, lengths, passes):
    model, count = changed_model(model_type, **changes)
    layers = model.config.num_hidden_layers
    assert count == layers
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapted, batch = with_adapters(model), random_batch(*lengths)
    loss = loss_of(PackedCausalLM(adapted), batch)
    found = gradients(adapted, loss)
    assert len(passes) == layers
    exact, wanted = exact_gradients(adapted, batch)
    assert abs(loss.item() - exact) < 5e-3 * exact
    assert max(relative_errors(found, wanted).values()) < 0.04


def test_it_is_as_accurate_as_the_unfused_layer(monkeypatch, passes):
    model, _ = changed_model()
    adapted, batch = with_adapters(model), random_batch(40, 24)
    wrapped = PackedCausalLM(adapted)
    fused = gradients(adapted, loss_of(wrapped, batch))
    assert passes
    monkeypatch.setattr(decoder, "_layer_of", lambda *_: None)
    parts = gradients(adapted, loss_of(wrapped, batch))
    _, wanted = exact_gradients(adapted, batch)
    assert sum(relative_errors(fused, wanted).values()) < 1.1 * sum(
        relative_errors(parts, wanted).values()
    )


@pytest.mark.parametrize(("kind", "model_type"), [("nf4", "llama"), ("fp4", "qwen2")])
def test_4bit_weights_equal_their_dequantized_values(kind, model_type, passes):
    import bitsandbytes as bnb
    from torch import nn

    def quantised(layer):
        ours = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None)
        ours.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=True
        ).to("cpu")
        ours.bias = layer.bias
        return ours

    model, _ = changed_model(model_type, intermediate_size=192)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn_like(parameter)
    plain, results = copy.deepcopy(model), []
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        where, _, last = name.rpartition(".")
        setattr(model.get_submodule(where), last, ours := quantised(layer))
        values = bnb.functional.dequantize_4bit(ours.weight.data, ours.weight.quant_state)
        plain.get_submodule(name).weight.data.copy_(values)
    for some in (model, plain):
        adapted = with_adapters(some)
        loss = loss_of(PackedCausalLM(adapted), random_batch(20, 12))
        results.append([loss, *gradients(adapted, loss).values()])
    assert len(passes) == 2 * model.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_saved_tensors_may_be_moved(passes):
    adapted = with_adapters(changed_model()[0])
    wrapped, batch = PackedCausalLM(adapted), random_batch(21, 12)
    plain = gradients(adapted, loss_of(wrapped, batch))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        found = gradients(adapted, loss_of(wrapped, batch))
    assert passes
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())


def test_nothing_is_written_past_the_saved_bytes(monkeypatch):
    measure, call, ends = Kernels.measure, Kernels.call, []
    canary = b"canary" * 20

    def longer(self, name, *arguments):
        return measure(self, name, *arguments) + len(canary) * (name == "decoder_saved")

    def watched(self, name, pointer, *arguments):
        if not name.startswith("decoder"):
            return call(self, name, pointer, *arguments)
        end = pointer._obj.saved + measure(self, "decoder_saved", pointer)
        if name == "decoder":
            ctypes.memmove(end, canary, len(canary))
        call(self, name, pointer, *arguments)
        ends.append(ctypes.string_at(end, len(canary)))
        return None

    monkeypatch.setattr(Kernels, "measure", longer)
    monkeypatch.setattr(Kernels, "call", watched)
    adapted = with_adapters(changed_model()[0])
    gradients(adapted, loss_of(PackedCausalLM(adapted), random_batch(21, 12)))
    assert ends and all(end == canary for end in ends)


def test_the_number_of_threads_changes_nothing(passes):
    adapted = with_adapters(changed_model(num_attention_heads=4, num_key_value_heads=2)[0])
    wrapped, batch = PackedCausalLM(adapted), random_batch(70, 33, 45)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = loss_of(wrapped, batch)
            results.append([loss, *gradients(adapted, loss).values()])
    finally:
        torch.set_num_threads(before)
    assert passes
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"dropout": 0.1}, {"target_modules": ["q_proj", "v_proj"]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_other_adapters(options, passes, monkeypatch):
    adapted = with_adapters(changed_model()[0], **options)
    wrapped = PackedCausalLM(adapted, autocast=torch.bfloat16)  # as if the head were trained

    def step():
        torch.manual_seed(1)
        return gradients(adapted, loss_of(wrapped, random_batch(20, 12)))

    found = step()
    used = "modules_to_save" in options  # the head is not part of a layer
    assert bool(passes) == used
    monkeypatch.setattr(decoder, "_layer_of", lambda *_: None)
    assert max(relative_errors(found, step()).values()) <= (0.05 if used else 0)


def test_disabled_adapters(passes):
    adapted = with_adapters(changed_model()[0])
    wrapped, batch = PackedCausalLM(adapted), random_batch(20, 12)
    on = loss_of(wrapped, batch).item()
    with adapted.disable_adapter():
        off = loss_of(wrapped, batch).item()
    assert len(passes) == 2 and off != on


def test_no_grad_and_recomputation_use_the_unfused_layer(passes):
    model, _ = changed_model()
    recomputing = copy.deepcopy(model)
    recomputing.activation_checkpointing_enable({"use_reentrant": False})
    recomputing.enable_input_require_grads()
    batch = random_batch(20, 12)
    with torch.no_grad():
        loss_of(PackedCausalLM(with_adapters(model)), batch)
    adapted = with_adapters(recomputing)
    gradients(adapted, loss_of(PackedCausalLM(adapted), batch))
    assert not passes


def test_trained_norms_keep_their_gradients(passes):
    adapted = with_adapters(
        changed_model()[0], modules_to_save=["input_layernorm", "post_attention_layernorm"]
    )
    grads = gradients(adapted, loss_of(PackedCausalLM(adapted), random_batch(20, 12)))
    norms = [grad for name, grad in grads.items() if "layernorm" in name]
    assert norms and all(grad.abs().sum() > 0 for grad in norms)
    assert not passes


def test_a_layer_with_another_residual_sum_is_not_changed(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def scaled(self, hidden_states, **kwargs):
        return forward(self, hidden_states, **kwargs) * 0.5

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    assert changed_model()[1] == 0


def test_layers_with_norms_per_head_are_not_changed():
    assert changed_model("qwen3")[1] == 0
