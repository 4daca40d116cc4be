"""Fused layers against the formulas, and which layers they replace."""

import sys
import types

import pytest
import torch
from liger_stub import LigerStub, Overwriting
from losses import loss_of
from torch import nn
from torch.nn import functional as F

from xtuner.kernels.attention import packed as attention
from xtuner.kernels.fused import liger, norm_mlp
from xtuner.kernels.fused.norm_mlp import GatedMLP, RMSNorm
from xtuner.memory.live_bytes import LiveBytes
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.check.isolation import IsolationCheck
from xtuner.testing.tiny import tiny_model


def test_rms_norm_equals_the_formula():
    torch.manual_seed(1)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.randn(16, dtype=torch.float64))
    ours = RMSNorm(weight, 1e-5)(x)
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (ours - plain).abs().max() < 1e-12
    grad_output = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, (x, weight), grad_output)
    for got, exact in zip(grads, torch.autograd.grad(plain, (x, weight), grad_output), strict=True):
        assert (got - exact).abs().max() < 1e-12


def gated(dtype, frozen=()):
    torch.manual_seed(2)
    layers = [nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)]
    for name, layer in zip(("gate", "up", "down"), layers, strict=True):
        layer.to(dtype).requires_grad_(name not in frozen)
    return layers


@pytest.mark.parametrize("frozen", [(), ("down",), ("gate", "up")])
def test_gated_mlp_equals_the_formula_without_saving_the_product(frozen):
    gate, up, down = gated(torch.float64, frozen)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for layer in (gate, up, down) for p in layer.parameters() if p.requires_grad)]
    ours = GatedMLP(gate, up, down)(x)
    plain = down(F.silu(gate(x)) * up(x))
    assert (ours - plain).abs().max() < 1e-12
    grad_output = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, inputs, grad_output)
    for got, exact in zip(grads, torch.autograd.grad(plain, inputs, grad_output), strict=True):
        assert (got - exact).abs().max() < 1e-12


def test_the_gradient_of_the_product_allocates_two_tensors():
    gate, up = (torch.randn(64, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    product = norm_mlp._SiluProduct.apply(gate, up)
    grad_output, counter = torch.ones_like(product), LiveBytes()
    with counter:
        grads = torch.autograd.grad(product, (gate, up), grad_output)
    assert max(counter.history) == 2 * 64 * 64 * 8
    for got, exact in zip(
        grads, torch.autograd.grad(F.silu(gate) * up, (gate, up), grad_output), strict=True
    ):
        assert (got - exact).abs().max() < 1e-12


def live_bytes_and_gradients(layers):
    """Bytes alive after the forward pass of a recomputing model, and its gradients."""
    model = tiny_model(num_hidden_layers=layers, intermediate_size=1024)
    model.set_attn_implementation(attention.register())
    assert norm_mlp.install(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    packed, counter = PackedCausalLM(model.train()), LiveBytes()
    with counter:
        loss = loss_of(packed, IsolationCheck(packed, (200, 56)).batch())
    kept = counter.live
    loss.backward()
    return kept, {name: p.grad for name, p in model.named_parameters()}


def test_recomputation_frees_the_mlp_too():
    """Only the input of a layer, [N, H], is saved; gate and up are 32 times as wide here."""
    live_bytes_and_gradients(2)  # fills caches that are shared by all runs
    (few, _), (more, recomputed) = live_bytes_and_gradients(2), live_bytes_and_gradients(6)
    assert 1.0 <= (more - few) / 4 / (256 * 32 * 4) < 1.5
    plain = tiny_model(num_hidden_layers=6, intermediate_size=1024).train()
    plain.set_attn_implementation(attention.register())
    packed = PackedCausalLM(plain)
    loss_of(packed, IsolationCheck(packed, (200, 56)).batch()).backward()
    for name, p in plain.named_parameters():
        assert (recomputed[name] - p.grad).abs().max() < 1e-4 * p.grad.abs().max(), name


class Block(nn.Module):
    """A layer in transformers' style."""

    def __init__(self, act=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gated(torch.float32)
        self.act_fn = act or nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Block):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Norm(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(12))
        self.variance_epsilon = 1e-6
        self.offset = offset

    def forward(self, x):
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return (self.weight + self.offset) * x * scale


def test_only_layers_that_compute_the_same_are_replaced():
    model = nn.ModuleDict(
        {
            "mlp": Block(),
            "norm": Norm(),
            "other act": Block(nn.GELU()),
            "swapped": Swapped(),
            "offset": Norm(1.0),
        }
    )
    names = list(model.state_dict())
    x = torch.randn(2, 3, 12)
    before = {name: layer(x) for name, layer in model.items()}
    assert norm_mlp.install(model) == 2
    assert isinstance(model["mlp"], GatedMLP) and isinstance(model["norm"], RMSNorm)
    assert sorted(model.state_dict()) == sorted(names)
    for name, layer in model.items():
        assert torch.allclose(layer(x), before[name], rtol=1e-5, atol=1e-6)
    assert norm_mlp.install(model) == 0


@pytest.mark.parametrize("wrong", [None, "rms_norm", "swiglu", "rope"])
def test_liger_kernels_are_used_only_if_they_pass_their_checks(monkeypatch, wrong):
    """Without a GPU: on the CPU, with torch in place of the kernels."""
    stub = LigerStub(wrong)
    for name, module in stub.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's state
        found, said = liger._checked.__wrapped__(torch.device("cpu"))
    assert (found is not None) == (wrong is None)
    assert said == (
        "Liger kernels" if found else "Liger kernels are not used (wrong results on this GPU)"
    )
    monkeypatch.setattr(norm_mlp, "liger_for", lambda x: found)
    gate, up, down = gated(torch.float32)
    x = torch.randn(2, 6, 12)
    stub.calls.clear()
    assert torch.allclose(GatedMLP(gate, up, down)(x), down(F.silu(gate(x)) * up(x)), atol=1e-5)
    RMSNorm(nn.Parameter(torch.ones(12)), 1e-5)(x)
    assert stub.calls == (["swiglu", "rms_norm"] if found else [])


def test_the_product_is_not_saved_with_kernels_that_overwrite_their_inputs(monkeypatch):
    gate, up, down = gated(torch.float64)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    plain = down(F.silu(gate(x)) * up(x))
    wanted = torch.autograd.grad(plain.square().sum(), (x, gate.weight, down.weight))
    stub = types.SimpleNamespace(silu_product=Overwriting.apply)
    monkeypatch.setattr(norm_mlp, "liger_for", lambda x: stub)
    counter = LiveBytes()
    with counter:
        ours = GatedMLP(gate, up, down)(x)
    assert counter.live == (20 + 20 + 12) * 12 * 8  # gate, up and the result; no product
    got = torch.autograd.grad(ours.square().sum(), (x, gate.weight, down.weight))
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_without_liger_or_a_gpu_there_are_no_kernels(monkeypatch):
    stub = LigerStub()
    for name, module in stub.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", None)
    found, said = liger._checked.__wrapped__(torch.device("cpu"))
    assert found is None and said.startswith("Liger kernels are not used (ModuleNotFoundError: ")
    monkeypatch.delitem(sys.modules, "liger_kernel")
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'xtuner[gpu]'" in liger._checked.__wrapped__(torch.device("cpu"))[1]
    assert liger.liger_for(torch.zeros(2)) is None
