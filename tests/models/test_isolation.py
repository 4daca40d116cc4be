"""What the check of packed rows detects, and what it accepts."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from xtuner.errors import ModelError
from xtuner.kernels.attention import packed as attention
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.check import isolation
from xtuner.models.check.attention import wrong_attention
from xtuner.models.check.isolation import IsolationCheck
from xtuner.models.check.training_pass import traceless
from xtuner.models.load import load_model
from xtuner.testing.tiny import tiny_model

GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2}


def packed(architecture="llama", *, implementation=None, autocast=None, **options):
    model = tiny_model(architecture, **options)
    model.set_attn_implementation(implementation or attention.register())
    return PackedCausalLM(model, autocast=autocast)


class Changed(nn.Module):
    """A layer of the model with a modified output ``[1, N, H]``."""

    def __init__(self, layer, change):
        super().__init__()
        self.layer, self.change = layer, change

    def forward(self, x):
        return self.change(self.layer(x))


def earlier(x):
    """The mean of all tokens up to each: the simplest linear attention."""
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


LEAKS = {
    "a state carried over": lambda x: x + 0.1 * earlier(x),
    "a convolution": lambda x: x + 0.1 * F.pad(x, (0, 0, 1, 0))[:, :-1],
    "a state without gradient": lambda x: x + earlier(x).detach(),
    "a norm over the row": lambda x: x / x.pow(2).mean((1, 2), keepdim=True).sqrt(),
    "the first token": lambda x: x + 0.02 * x[:, :1],
    "a later token": lambda x: x + 0.1 * F.pad(x, (0, 0, 0, 1))[:, 1:],
    "the last token": lambda x: x + 0.02 * x[:, -1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_in_a_layer_is_found(leak, dtype):
    lm = packed()
    layer = lm.causal.model.layers[1]
    layer.mlp = Changed(layer.mlp, LEAKS[leak])
    lm.to(dtype)
    with pytest.raises(ModelError, match="neighbours"):
        lm.verify()


@contextlib.contextmanager
def attention_as(change):
    """xtuner's attention with other arguments."""

    def changed(module, query, key, value, mask, **options):
        return attention.packed_attention(module, query, key, value, mask, **change(options))

    attention.register()
    AttentionInterface.register(attention.NAME, changed)
    try:
        yield
    finally:
        attention.register()


def without_cu_seqlens(options):
    return {**options, "cu_seq_lens_q": options["cu_seq_lens_q"][[0, -1]]}


def shifted_cu_seqlens(options):
    cu_seqlens = options["cu_seq_lens_q"].clone()
    cu_seqlens[1:-1] += 1
    return {**options, "cu_seq_lens_q": cu_seqlens}


def wider(options):
    window = options.get("sliding_window")
    return {**options, "sliding_window": window and window + 1}


@pytest.mark.parametrize("change", [without_cu_seqlens, shifted_cu_seqlens])
def test_an_attention_with_wrong_cu_seqlens_is_found(change):
    lm = packed()
    with attention_as(change), pytest.raises(ModelError, match="neighbours"):
        lm.verify()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_window_one_too_wide_is_found(dtype):
    lm = packed("mistral", sliding_window=4096).to(dtype)  # longer than the probe
    device = torch.device("cpu")
    assert not wrong_attention(attention.NAME, width=8, device=device, dtype=dtype)
    assert lm.verify() is None
    with attention_as(wider), pytest.raises(ModelError, match="window of 3 tokens"):
        lm.verify()


def test_window_one_too_wide_is_detected_in_the_model():
    lm = packed("mistral", sliding_window=4)
    with traceless(lm), attention_as(wider):
        check = IsolationCheck(lm)
        assert check.leak() is None
        found, allowed = check.displaced()
    assert found > 100 * allowed


def test_an_attention_that_ignores_causality_is_found():
    def everything(module, query, key, value, mask, **options):
        ends = options["cu_seq_lens_q"].tolist()
        parts = [
            F.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), enable_gqa=True
            )
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    lm = packed()
    AttentionInterface.register(attention.NAME, everything)
    try:
        with pytest.raises(ModelError, match="later in its own text"):
            lm.verify()
    finally:
        attention.register()


class OtherPositions(PackedCausalLM):
    """Gives the model positions as `change` makes them."""

    def inputs_of(self, batch):
        inputs = super().inputs_of(batch)
        return {**inputs, "position_ids": self.change(inputs["position_ids"])}


POSITIONS = {
    "go on": lambda positions: torch.arange(positions.shape[1])[None],
    "shifted": lambda positions: positions + 1,
    "all zero": torch.zeros_like,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", POSITIONS)
def test_wrong_learned_positions_are_found(change, dtype):
    model = tiny_model("gpt2", **GPT2).to(dtype)
    model.set_attn_implementation(attention.register())
    assert PackedCausalLM(model).verify() is None
    lm = OtherPositions(model)
    lm.change = POSITIONS[change]
    with pytest.raises(ModelError, match="positions or boundaries"):
        lm.verify()


def test_rotary_positions_that_go_on_change_nothing_and_those_that_stand_still_are_found():
    model = tiny_model()
    model.set_attn_implementation(attention.register())
    lm = OtherPositions(model)
    lm.change = POSITIONS["go on"]
    assert lm.verify() is None  # only distances count
    lm.change = POSITIONS["all zero"]
    with pytest.raises(ModelError, match="positions or boundaries"):
        lm.verify()


def test_positions_that_go_on_are_a_leak_where_the_mask_is_made_of_them():
    model = tiny_model()
    model.set_attn_implementation("sdpa")
    lm = OtherPositions(model)
    lm.change = POSITIONS["go on"]
    with pytest.raises(ModelError, match="neighbours"):
        lm.verify()


class RowsRound(nn.Linear):
    """A product whose rounding depends on the number of rows, as in bitsandbytes' `gemm_4bit`:
    1 % of the largest values, independent of the content of other rows."""

    def forward(self, x):
        out = super().forward(x)
        rows = x.shape[-2]
        count = torch.arange(rows, dtype=torch.float32)[:, None] * 7.7
        waves = torch.sin(count + torch.arange(out.shape[-1]) * 12.9 + rows * 3.3)
        return out + (0.004 * waves * out.detach().abs().amax(-1, keepdim=True)).to(out.dtype)


@pytest.mark.parametrize("depth", [2, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rounding_that_depends_on_the_number_of_rows_is_no_leak(depth, dtype):
    lm = packed(num_hidden_layers=depth).to(dtype)
    for layer in lm.causal.modules():
        if type(layer) is nn.Linear and layer is not lm.causal.lm_head:
            layer.__class__ = RowsRound
    note = lm.verify()
    assert note is None or "could not be checked" in note
    layer = lm.causal.model.layers[0]
    layer.mlp = Changed(layer.mlp, LEAKS["a state carried over"])
    with pytest.raises(ModelError, match="neighbours"):
        lm.verify()


class Capacity(nn.Module):
    """Two experts that take at most half of the row's tokens each, first come, first served."""

    def __init__(self, first, width):
        super().__init__()
        self.experts = nn.ModuleList([first, nn.Linear(width, width)])
        self.router = nn.Linear(width, 2)

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = (weights.argmax(-1) == number).nonzero()[: x.shape[1] // 2, 1]
            out[:, chosen] = expert(x[:, chosen]) * weights[:, chosen, number, None]
        return out


def test_experts_with_a_capacity_are_no_leak():
    lm = packed()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for layer in lm.causal.model.layers:
            layer.mlp = Capacity(layer.mlp, 32)
    with traceless(lm):
        check = IsolationCheck(lm)
        assert check.leak() is None
        first, second = check._last
        assert first.distance(second) > 0.01  # tokens are dropped for their neighbours
    lm.verify()


class TensorQuantised(nn.Linear):
    """Rounds its input to 8 bits with one scale for all rows."""

    def forward(self, x):
        scale = x.detach().abs().max() / 127
        rounded = (x / scale).round() * scale
        return super().forward(x + (rounded - x).detach())


def test_one_scale_for_all_rows_is_no_leak():
    lm = packed()
    for layer in lm.causal.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).__class__ = TensorQuantised
    with traceless(lm):
        check = IsolationCheck(lm)
        assert check.leak() is None
        assert check._last[0].distance(check._last[1]) > 1e-4
    assert lm.verify() is None


SOUND = {
    "mixtral": ("mixtral", {}),
    "gemma2": ("gemma2", {"sliding_window": 4}),
    "gemma3": ("gemma3_text", {"sliding_window": 4}),
    "cohere2": ("cohere2", {"sliding_window": 4}),
    "deep": ("llama", {"num_hidden_layers": 24}),
    "attention dropout": ("llama", {"attention_dropout": 0.5}),
    "dropout of gpt2": ("gpt2", {**GPT2, "resid_pdrop": 0.3, "attn_pdrop": 0.3, "embd_pdrop": 0.3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", SOUND)
def test_valid_models_pass(case, dtype):
    architecture, options = SOUND[case]
    note = packed(architecture, **options).to(dtype).verify()
    assert note is None or "output head" in note


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_beside_quantised_weights_pass_and_a_leak_beside_them_does_not(
    tmp_path, quantization, dropout
):
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16, quantization=quantization)
    model.set_attn_implementation(attention.register())
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    lm = PackedCausalLM(adapters.add_adapter(model, r=8, alpha=16, dropout=dropout))
    assert lm.verify() is None
    layer = lm.causal.model.layers[0]
    layer.mlp = Changed(layer.mlp, LEAKS["a convolution"])
    with pytest.raises(ModelError, match="neighbours"):
        lm.verify()


def test_the_passes_are_those_of_training_and_leave_no_trace():
    lm = packed("gpt2", **GPT2)
    seen = []
    lm.causal.transformer.h[0].mlp.register_forward_hook(
        lambda module, inputs, output: seen.append(
            (module.training, output.requires_grad, output.shape[1])
        )
    )
    lm.eval()
    lm.causal.transformer.h[1].train()
    modes = [module.training for module in lm.modules()]
    before, drop = torch.get_rng_state(), lm.causal.transformer.drop.p
    hooks = sum(len(module._forward_hooks) for module in lm.modules())
    assert lm.verify() is None
    assert (True, True, 32) in seen
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [module.training for module in lm.modules()]
    assert all(p.grad is None for p in lm.parameters())
    assert lm.causal.transformer.drop.p == drop > 0
    assert sum(len(module._forward_hooks) for module in lm.modules()) == hooks
    assert lm.causal.config._attn_implementation == attention.NAME


def test_valid_model_takes_few_passes(monkeypatch):
    lm, calls = packed(), []
    lm.causal.model.register_forward_hook(lambda *_: calls.append(1))
    assert lm.verify() is None
    assert len(calls) == 5  # two rows, the sample alone, and two for the output head


def test_weights_that_are_not_finite_are_no_leak():
    lm = packed()
    lm.causal.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        lm.verify()


def test_leak_disables_packing_if_not_required():
    lm = packed()
    layer = lm.causal.model.layers[1]
    layer.mlp = Changed(layer.mlp, LEAKS["a convolution"])
    assert "one sample at a time" in lm.verify(packed=False)
    assert lm.apart


def test_a_model_that_reads_later_tokens_of_a_sample_alone_is_refused():
    lm = packed()
    layer = lm.causal.model.layers[1]
    layer.mlp = Changed(layer.mlp, LEAKS["a later token"])
    with pytest.raises(ModelError, match="cannot be trained"):
        lm.verify(packed=False)


def test_row_that_fails_disables_packing():
    lm = packed()

    def refuse(module, inputs, output):
        if output.shape[1] > 20:
            raise TypeError("a row of several samples")

    lm.causal.model.layers[0].mlp.register_forward_hook(refuse)
    with pytest.raises(
        ModelError, match=r"TypeError: a row of several.* pack_to_max_length = Fals"
    ):
        lm.verify()
    assert "one sample at a time: a row of several samples fails with TypeError" in lm.verify(
        packed=False
    )


@pytest.mark.parametrize(("kind", "sizes"), [("bert", {}), ("xlnet", {"d_head": 8})])
def test_an_encoder_is_refused_for_what_it_is(kind, sizes):
    with pytest.raises(
        ModelError, match=r"later in its own text.*As configured it is not a causal language"
    ):
        PackedCausalLM(tiny_model(kind, **sizes)).verify(packed=False)


def test_a_decoder_under_another_name_is_found():
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    lm = PackedCausalLM(tiny_model("llama4_text", **sizes))
    lm.verify(packed=False)
    batch = IsolationCheck(lm).batch()
    assert lm(batch).isfinite().all()


def test_numbers_that_round_as_measured():
    """The rounding that the check assumes is that of the dtype."""
    values = torch.linspace(1, 2, 10001, dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16):
        relative = ((values.to(dtype).double() - values) / values).pow(2).mean().sqrt()
        eps = torch.finfo(dtype).eps
        assert 0.5 < isolation.ROUNDING * eps / float(relative) < 2
