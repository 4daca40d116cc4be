"""Linear layers with LoRA as one operation against the plain formula."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtuner.kernels.lora.linear import Adapted, lora_linears


def problem(dtype, bias=True):
    torch.manual_seed(5)
    layer = nn.Linear(24, 40, bias=bias, dtype=dtype).requires_grad_(False)
    x = torch.randn(2, 7, 24, dtype=dtype, requires_grad=True)
    down = torch.randn(4, 24, dtype=dtype, requires_grad=True)
    up = torch.randn(40, 4, dtype=dtype, requires_grad=True)
    return layer, x, down, up


def lora_linear(x, layer, down, up, *, scaling, dropout=0.0):
    return lora_linears(x, [Adapted(layer, down, up, scaling, dropout)])[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_values_and_gradients_equal_the_formula(bias, dropout):
    layer, x, down, up = problem(torch.float64, bias)
    torch.manual_seed(8)
    ours = lora_linear(x, layer, down, up, scaling=1.7, dropout=dropout)
    torch.manual_seed(8)
    dropped = F.dropout(x.flatten(0, -2), dropout).view_as(x)
    plain = layer(x) + dropped @ down.T @ up.T * 1.7
    assert (ours - plain).abs().max() < 1e-12
    grad_output = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, (x, down, up), grad_output)
    for got, exact in zip(
        grads, torch.autograd.grad(plain, (x, down, up), grad_output), strict=True
    ):
        assert (got - exact).abs().max() < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_layers_with_one_input_together_equal_the_formula(dropout, input_needs_gradient):
    torch.manual_seed(6)
    shapes = [(40, 4, 1.7), (24, 2, 0.5), (8, 4, 3.0)]  # out, rank, scaling
    parts = []
    for out, rank, scaling in shapes:
        layer = nn.Linear(24, out, dtype=torch.float64).requires_grad_(False)
        down = torch.randn(rank, 24, dtype=torch.float64, requires_grad=True)
        up = torch.randn(out, rank, dtype=torch.float64, requires_grad=True)
        parts.append(Adapted(layer, down, up, scaling, dropout))
    x = torch.randn(2, 7, 24, dtype=torch.float64, requires_grad=input_needs_gradient)
    torch.manual_seed(9)
    ours = lora_linears(x, parts)
    torch.manual_seed(9)
    plain = []
    for part in parts:
        dropped = F.dropout(x.flatten(0, -2), dropout).view_as(x)
        plain.append(part.layer(x) + dropped @ part.down.T @ part.up.T * part.scaling)
    trained = [t for part in parts for t in (part.down, part.up)] + [x] * input_needs_gradient
    grad_outputs = [torch.randn_like(out) for out in plain[:2]]  # the third is unused
    for got, exact in zip(ours, plain, strict=True):
        assert (got - exact).abs().max() < 1e-12
    grads = torch.autograd.grad(ours[:2], trained, grad_outputs, materialize_grads=True)
    wanted = torch.autograd.grad(plain[:2], trained, grad_outputs, materialize_grads=True)
    for got, exact in zip(grads, wanted, strict=True):
        assert (got - exact).abs().max() < 1e-12


def test_the_frozen_layer_gets_no_gradient_and_the_first_input_needs_none():
    layer, x, down, up = problem(torch.float64)
    lora_linear(x.detach(), layer, down, up, scaling=1.0).sum().backward()
    assert layer.weight.grad is None and down.grad is not None and up.grad is not None


def test_float32_adapters_on_bfloat16_weights_get_float32_gradients():
    layer, x, down, up = problem(torch.float64)
    plain = layer(x) + x @ down.T @ up.T * 0.5
    exact = torch.autograd.grad(plain.square().mean(), (x, down, up))
    small = [t.detach().bfloat16().requires_grad_() for t in (x,)]
    wide = [t.detach().float().requires_grad_() for t in (down, up)]
    ours = lora_linear(small[0], layer.bfloat16(), *wide, scaling=0.5)
    assert ours.dtype == torch.bfloat16
    grads = torch.autograd.grad(ours.double().square().mean(), (*small, *wide))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    for got, wanted in zip(grads, exact, strict=True):
        assert (got - wanted).norm() < 0.02 * wanted.norm()


def test_autocast_multiplies_in_its_type():
    layer, x, down, up = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = lora_linear(x, layer, down, up, scaling=0.5)
    assert ours.dtype == torch.bfloat16
    ours.float().sum().backward()
    assert x.grad.dtype == down.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantised_layer_equals_its_dequantised_weights(kind):
    import bitsandbytes as bnb

    torch.manual_seed(2)
    layer = bnb.nn.Linear4bit(
        64, 128, bias=False, compute_dtype=torch.float32, quant_type=kind, compress_statistics=True
    ).to("cpu")
    x = torch.randn(9, 64, requires_grad=True)
    down = torch.randn(4, 64, requires_grad=True)
    up = torch.randn(128, 4, requires_grad=True)
    values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    plain = x @ values.T.float() + x @ down.T @ up.T * 0.5
    ours = lora_linear(x, layer, down, up, scaling=0.5)
    grad_output = torch.randn_like(plain)
    grads = torch.autograd.grad(ours, (x, down, up), grad_output)
    for got, exact in zip(
        grads, torch.autograd.grad(plain, (x, down, up), grad_output), strict=True
    ):
        assert (got - exact).norm() < 1e-5 * exact.norm()


def test_float16_gives_the_gradients_of_float64():
    layer, x, down, up = problem(torch.float64)
    down, up = (t.detach().mul(0.1).requires_grad_() for t in (down, up))
    plain = layer(x) + x @ down.T @ up.T * 0.5
    exact = torch.autograd.grad(plain.square().mean(), (x, down, up))
    small = x.detach().half().requires_grad_()
    wide = [t.detach().float().requires_grad_() for t in (down, up)]
    ours = lora_linear(small, layer.half(), *wide, scaling=0.5)
    assert ours.dtype == torch.float16
    grads = torch.autograd.grad(ours.double().square().mean() * 2**12, (small, *wide))
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32]
    for got, wanted in zip(grads, exact, strict=True):
        assert (got.double() / 2**12 - wanted).norm() < 2e-3 * wanted.norm()
