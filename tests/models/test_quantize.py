"""4-bit weights, compared with their codes and scales."""

import pytest
import torch
from torch import nn

from xtuner.device.select import DTYPES
from xtuner.kernels.four_bit import fix_4bit_layers
from xtuner.kernels.lora.linear import frozen_weight
from xtuner.models.load import load_model
from xtuner.models.quantize import Rounding
from xtuner.models.run_info import RunInfo
from xtuner.testing.tiny import tiny_model_folder


def quantised(width, out, *, kind, double):
    import bitsandbytes as bnb

    torch.manual_seed(2)
    layer = bnb.nn.Linear4bit(width, out, bias=True, quant_type=kind)
    layer.weight = bnb.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type=kind, compress_statistics=double
    ).to("cpu")
    return layer


def values(layer):
    """The weight by definition: codes times the scale of each block of 64."""
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
    """Also if rows are not complete blocks, which bitsandbytes misreads on a CPU."""
    layer = quantised(width, 24, kind=kind, double=double)
    wanted = values(layer)
    model = nn.Sequential(layer)
    fix_4bit_layers(model)
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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_of_a_run_is_that_of_the_model_it_trained(tmp_path, dtype):
    """Whatever 'auto' meant on the machine of the run."""
    folder = tiny_model_folder(tmp_path / "model", hidden_size=64, initializer_range=0.3)
    info = RunInfo("adapter", "base", settings={"tuning": "qlora", "dtype": "auto"}, dtype=dtype)
    info.write(tmp_path)
    read = RunInfo.read(tmp_path)
    rounding = Rounding.of_run(read.settings, read.computed_in)
    plain = load_model(folder, dtype=torch.float32)
    held = load_model(folder, dtype=DTYPES[dtype], quantization="nf4")
    name = "model.layers.0.mlp.gate_proj"
    held_layer, weight = held.get_submodule(name), plain.get_submodule(name).weight
    wanted = frozen_weight(held_layer, torch.float32)
    assert torch.equal(rounding(weight.detach()), wanted)
    if dtype == "float16":  # and not that of bfloat16
        assert not torch.equal(Rounding.of_run(read.settings)(weight.detach()), wanted)
