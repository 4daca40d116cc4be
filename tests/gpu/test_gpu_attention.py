"""Attention of packed rows on a GPU against the formula in float64 on the CPU."""

import itertools
import math

import pytest
import torch
from torch import nn

from xtuner.kernels.attention.packed import packed_attention

pytestmark = pytest.mark.gpu

HEADS = {"mha": (4, 4), "gqa": (8, 2), "mqa": (4, 1)}
LENGTHS = {
    "one token": (1,),
    "single tokens": (1, 1, 1),
    "two": (5, 12),
    "odd": (1, 33, 7, 129, 2),
    "long": (700, 300),
}


def formula(q, k, v, lengths, *, scale, window=None):
    """``[1, N, heads, D]`` from float64 ``[1, heads, N, D]``."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outs = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        part = slice(start, end)
        scores = q[:, :, part] @ k[:, :, part].transpose(-1, -2) * scale
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if window is None else seen.triu(1 - window)
        outs.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, :, part])
    return torch.cat(outs, 2).transpose(1, 2)


def inputs(lengths, heads, width, dtype):
    draw = torch.Generator().manual_seed(0)
    total = sum(lengths)
    return [
        torch.randn(1, count, total, width, generator=draw).to(dtype)
        for count in (heads[0], heads[1], heads[1])
    ]


def both(card, dtype, lengths, heads, width, window=None):
    """Results and gradients: those of the device, and the exact ones."""
    q, k, v = inputs(lengths, heads, width, dtype)
    cum = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {"cu_seq_lens_q": cum, "cu_seq_lens_k": cum}
    options |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    options |= {} if window is None else {"sliding_window": window}
    ours = [x.to(card).requires_grad_() for x in (q, k, v)]
    scale = width**-0.5
    out, _ = packed_attention(nn.Module(), *ours, None, scaling=scale, **options)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    right = formula(*wide, lengths, scale=scale, window=window)
    grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = [out, *torch.autograd.grad(out, ours, grad.to(card))]
    return found, [right, *torch.autograd.grad(right, wide, grad.double())]


def compare(close, found, wanted):
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        # A token that attends only to itself has gradients of 0, the difference of rounded numbers.
        close(a, b, size=float(b.numel() ** 0.5) if name in ("dq", "dk") else 0.0)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_every_length_and_grouping(card, dtype, close, heads, lengths):
    compare(close, *both(card, dtype, lengths, heads, 64))


@pytest.mark.parametrize("width", [64, 80, 96, 128, 256])
def test_every_width_of_heads(card, half, close, width):
    compare(close, *both(card, half, (5, 40, 1), (4, 2), width))


@pytest.mark.parametrize("window", [1, 2, 16, 64, 5000])
def test_windows(card, half, close, window):
    compare(close, *both(card, half, (3, 130, 64), (4, 2), 64, window))


def test_a_window_that_is_one_too_wide_would_be_seen(card, half):
    found, _ = both(card, half, (3, 130, 64), (4, 2), 64, 16)
    _, other = both(card, half, (3, 130, 64), (4, 2), 64, 17)
    apart = (found[0].detach().double().cpu() - other[0].detach()).norm()
    assert apart > 4 * torch.finfo(half).eps * other[0].norm()


def test_another_neighbour_changes_no_bit(card, half):
    lengths = (7, 50, 1, 90)
    cum = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    options = {"cu_seq_lens_q": cum, "max_length_q": max(lengths)}
    options |= {"cu_seq_lens_k": cum, "max_length_k": max(lengths)}
    first = [x.to(card) for x in inputs(lengths, (4, 2), 64, half)]
    second = [x.clone() for x in first]
    for x in second:
        x[:, :, :7] = 3.0
    outs = [packed_attention(nn.Module(), *x, None, **options)[0] for x in (first, second)]
    assert torch.equal(outs[0][:, 7:], outs[1][:, 7:])
    assert not torch.equal(outs[0][:, :7], outs[1][:, :7])
