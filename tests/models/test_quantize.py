"""Weights of four bits, against their own codes and scales."""

import pytest
import torch
from torch import nn

from xtuner.kernels.four_bit import mend_4bit_layers
from xtuner.kernels.lora_linear import frozen_weight
from xtuner.models.quantize import Rounding


def quantised(width, out, *, kind, double):
    import bitsandbytes as bnb

    torch.manual_seed(2)
    layer = bnb.nn.Linear4bit(width, out, bias=True, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=double
    ).to("cpu")
    return layer


def values(layer):
    """What the weight is by definition: codes times the scale of each 64 in a row."""
    state, packed = layer.weight.quant_state, layer.weight.data.flatten()
    codes = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten().long()]
    scales = state.absmax
    if state.nested:
        of_scales = state.state2
        groups = of_scales.absmax.repeat_interleave(of_scales.blocksize)[: len(scales)]
        scales = of_scales.code[scales.long()] * groups + state.offset
    whole = codes * scales.repeat_interleave(64)[: len(codes)]
    return whole.view(layer.out_features, layer.in_features)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("width", [64, 128, 32, 112, 104], ids=str)
def test_all_ways_read_the_same_numbers(width, kind, double):
    """Also where rows are no whole blocks, which bitsandbytes by itself misreads on a CPU."""
    layer = quantised(width, 24, kind=kind, double=double)
    wanted = values(layer)
    model = nn.Sequential(layer)
    mend_4bit_layers(model)
    assert torch.equal(frozen_weight(model[0], torch.float32), wanted)
    x = torch.randn(5, width, requires_grad=True)
    out = model(x)
    assert (out - (x @ wanted.T + layer.bias)).abs().max() < 1e-5
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert (grad - wanted.sum(0)).abs().max() < 1e-4
    with torch.no_grad():
        assert (model.eval()(x) - out).abs().max() < 1e-5


@pytest.mark.parametrize("width", [64, 112], ids=str)
def test_rounding_is_that_of_the_quantised_layer(width):
    torch.manual_seed(2)
    plain = torch.nn.Linear(width, 24).weight.data
    layer = quantised(width, 24, kind="nf4", double=True)
    rounded = Rounding("nf4", double_quant=True, dtype=torch.float32)(plain)
    assert torch.equal(rounded, values(layer))
