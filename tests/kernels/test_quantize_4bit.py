"""Compiled 4-bit quantization against its formula (arXiv:2305.14314, section 3) in torch."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit

from xtuner.kernels import compiled
from xtuner.kernels.quantize_4bit import use_compiled

CODE = get_4bit_type("nf4", device="cpu")


def formula(x, block):
    """The scale of each block, and two codes per byte."""
    blocks = x.float().reshape(-1, block)
    scales = blocks.abs().amax(1)
    shares = blocks * (1 / scales.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(shares, (CODE[:-1] + CODE[1:]) / 2).reshape(-1)
    return (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], scales


@pytest.fixture(autouse=True)
def _compiled():
    if not use_compiled():
        pytest.skip("no compiled kernels")


@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_are_those_of_the_formula(dtype, block):
    x = (torch.randn(96, 128) * torch.logspace(-6, 1, 96)[:, None]).to(dtype)
    x[5] = 0
    packed, state = quantize_4bit(x, blocksize=block, compress_statistics=False, quant_type="nf4")
    wanted, scales = formula(x, block)
    assert torch.equal(packed, wanted)
    assert torch.equal(state.absmax, scales)


def test_values_on_a_bound_fall_as_in_the_formula():
    bounds = (CODE[:-1] + CODE[1:]) / 2
    x = torch.cat([torch.tensor([1.0]), bounds, bounds.nextafter(torch.tensor(2.0)), -bounds])
    x = torch.cat([x, torch.zeros(64 - len(x))])
    assert torch.equal(quantize_4bit(x, blocksize=64, quant_type="nf4")[0], formula(x, 64)[0])


def test_a_value_that_is_no_number_is_not_lost():
    x = torch.randn(2, 64)
    x[1, 7] = float("nan")
    packed, state = quantize_4bit(x, blocksize=64, compress_statistics=False, quant_type="nf4")
    found = dequantize_4bit(packed, state)
    assert found[0].isfinite().all() and found[1].isnan().any()


@pytest.mark.parametrize(("kind", "shape"), [("fp4", (4, 64)), ("nf4", (5, 33))])
def test_the_rest_is_left_to_bitsandbytes(kind, shape, monkeypatch):
    def refuse(*tensors):
        raise AssertionError("the compiled kernel was asked for")

    monkeypatch.setattr(compiled, "kernels_for", refuse)
    x = torch.randn(shape)
    packed, state = quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=False)
    assert len(packed) == -(-x.numel() // 2)
    wanted, scales = formula(x.reshape(-1)[:128], 64)
    assert torch.equal(state.absmax[:2], scales)
    assert torch.equal(packed[:64], wanted) == (kind == "nf4")
