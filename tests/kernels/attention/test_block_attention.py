"""Block-wise attention against the formula, one sample at a time, in float64."""

import itertools
import math

import pytest
import torch

from xtuner.kernels.attention import block_layout
from xtuner.kernels.attention.block_layout import layout_of, shared_blocks
from xtuner.kernels.attention.blocks import block_attention


def row(cu_seqlens, heads=4, kv_heads=2, width=8, value_width=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width)]
    return [
        torch.randn(cu_seqlens[-1], *shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in shapes
    ]


def plain(query, key, value, cu_seqlens, scale, window=None):
    outputs = []
    for start, end in itertools.pairwise(cu_seqlens):
        q = query[start:end].transpose(0, 1)
        k, v = (
            x[start:end].transpose(0, 1).repeat_interleave(query.shape[1] // x.shape[1], 0)
            for x in (key, value)
        )
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        scores = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


LAYOUTS = {
    "one token": (0, 1),
    "one block": (0, 64),
    "boundaries inside blocks": (0, 7, 8, 100, 101, 230),
    "boundaries on blocks": (0, 64, 128, 320),
    "no multiple": (0, 150, 333),
    "long": (0, 700, 710),
}


@pytest.mark.parametrize("window", [None, 1, 20, 100], ids="window={}".format)
@pytest.mark.parametrize("cu_seqlens", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_values_and_gradients_equal_the_formula(cu_seqlens, window, heads, kv_heads):
    inputs = row(cu_seqlens, heads, kv_heads)
    ours = block_attention(*inputs, cu_seqlens, scale=0.3, window=window)
    wanted = plain(*inputs, cu_seqlens, 0.3, window)
    assert (ours - wanted).abs().max() < 1e-12
    grad_output = torch.randn_like(wanted)
    grads = torch.autograd.grad(ours, inputs, grad_output)
    for got, exact in zip(grads, torch.autograd.grad(wanted, inputs, grad_output), strict=True):
        assert (got - exact).abs().max() < 1e-12


def test_recomputing_long_samples_and_splitting_blocks_change_nothing(monkeypatch):
    cu_seqlens = (0, 300, 310, 640)
    inputs = row(cu_seqlens)
    grad_output = torch.randn(640, 4, 8, dtype=torch.float64)

    def gradients():
        shared_blocks.cache_clear()
        return torch.autograd.grad(
            block_attention(*inputs, cu_seqlens, scale=0.3), inputs, grad_output
        )

    default = gradients()
    monkeypatch.setattr(block_layout, "MAX_SAVED_KEYS", 128)
    monkeypatch.setattr(block_layout, "MAX_SCORES", 4 * 64 * 130)
    for got, exact in zip(gradients(), default, strict=True):
        assert (got - exact).abs().max() < 1e-12


def test_values_may_be_wider_than_keys():
    cu_seqlens = (0, 90, 130)
    inputs = row(cu_seqlens, width=8, value_width=12)
    ours = block_attention(*inputs, cu_seqlens, scale=1.0)
    assert (ours - plain(*inputs, cu_seqlens, 1.0)).abs().max() < 1e-12


def test_bfloat16_gradients_are_as_close_as_those_of_torch():
    """Against float64 on the rounded inputs; torch's kernel is called once per sample."""
    cu_seqlens = (0, 90, 350, 512)
    exact_inputs = [
        x.detach().bfloat16().double().requires_grad_() for x in row(cu_seqlens, width=64)
    ]
    exact_inputs[2] = exact_inputs[0].detach()[:, :2].clone().requires_grad_()
    grad_output = torch.randn(512, 4, 64, dtype=torch.float64)
    exact = torch.autograd.grad(plain(*exact_inputs, cu_seqlens, 0.125), exact_inputs, grad_output)

    def torch_kernel(query, key, value):
        parts = []
        for start, end in itertools.pairwise(cu_seqlens):
            q, k, v = (x[None, start:end].transpose(1, 2) for x in (query, key, value))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=0.125, enable_gqa=True
            )
            parts.append(out.transpose(1, 2)[0])
        return torch.cat(parts)

    def errors(attend):
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact_inputs]
        grads = torch.autograd.grad(attend(*inputs), inputs, grad_output.bfloat16())
        return [float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)]

    ours = errors(lambda *x: block_attention(*x, cu_seqlens, scale=0.125))
    theirs = errors(torch_kernel)
    assert all(a < 0.01 and a < 2 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_little_work_is_spent_on_masked_pairs():
    """Six samples in a row of 1,024: at most a quarter of all pairs."""
    layout = layout_of((0, 260, 350, 590, 740, 920, 1024), None)
    assert layout.pairs < 1024 * 1024 / 4


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_mixed_dtypes_are_an_error(odd):
    """The compiled loops support one dtype: a bfloat16 row read as float32 is half as long."""
    inputs = [x.detach().bfloat16() for x in row((0, 90))]
    inputs[odd] = inputs[odd].float()
    with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
        block_attention(*inputs, (0, 90), scale=1.0)
