"""Layers with hand-written gradients against the plain formulas, and where they may be put."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtuner.models import fused_layers
from xtuner.models.fused_layers import GatedMLP, RMSNorm


def test_rms_norm_equals_the_formula():
    torch.manual_seed(1)
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.randn(16, dtype=torch.float64))
    ours = RMSNorm(weight, 1e-5)(x)
    plain = weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert (ours - plain).abs().max() < 1e-12
    pull = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, (x, weight), pull)
    for got, exact in zip(grads, torch.autograd.grad(plain, (x, weight), pull), strict=True):
        assert (got - exact).abs().max() < 1e-12


def gated(dtype, frozen=()):
    torch.manual_seed(2)
    layers = [nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)]
    for name, layer in zip(("gate", "up", "down"), layers, strict=True):
        layer.to(dtype).requires_grad_(name not in frozen)
    return layers


@pytest.mark.parametrize("frozen", [(), ("down",), ("gate", "up")])
def test_gated_mlp_equals_the_formula_although_it_keeps_no_product(frozen):
    gate, up, down = gated(torch.float64, frozen)
    x = torch.randn(2, 6, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(p for layer in (gate, up, down) for p in layer.parameters() if p.requires_grad)]
    ours = GatedMLP(gate, up, down)(x)
    plain = down(F.silu(gate(x)) * up(x))
    assert (ours - plain).abs().max() < 1e-12
    pull = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, inputs, pull)
    for got, exact in zip(grads, torch.autograd.grad(plain, inputs, pull), strict=True):
        assert (got - exact).abs().max() < 1e-12


class Block(nn.Module):
    """A layer as transformers writes it."""

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
    assert fused_layers.install(model) == 2
    assert isinstance(model["mlp"], GatedMLP) and isinstance(model["norm"], RMSNorm)
    assert sorted(model.state_dict()) == sorted(names)
    for name, layer in model.items():
        assert torch.allclose(layer(x), before[name], rtol=1e-5, atol=1e-6)
    assert fused_layers.install(model) == 0
