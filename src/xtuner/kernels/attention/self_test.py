"""Test an attention kernel on this machine against a reference implementation.

The output and gradients for a small random row of several samples are compared with the formula in
float64, computed per sample.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtuner.errors import brief
from xtuner.kernels.attention.call import AttentionCall, Kernel

TEST_LENGTHS = (1, 3, 130, 64, 70)
"""Sample lengths of the test row: below, at and above the block sizes 64 and 128 of kernels."""
TEST_WINDOW = 20
"""Wider windows are tested with this one, so that samples are longer than the window."""
DROPOUT_LENGTHS = (5, 8, 1, 7)
"""With dropout, no sample is longer than the smallest head size, so that the output can hold the
attention weights."""
TEST_DROPOUT = 0.5
TOLERANCE = {torch.float32: 2e-3}
"""Maximum relative error by norm; 2e-2 in 16 bits. Kernels round float32 to TF32 (5e-4); a window
that is off by one, or attention to a neighbouring sample, gives more than 5e-2."""


def failure_of(kernel: Kernel, call: AttentionCall) -> str:
    """Run the test and return what fails; empty if `kernel` passes."""
    test = _with_dropout if call.dropout else _without_dropout
    try:
        # A new thread has none of the caller's grad mode, autocast and saved-tensor hooks.
        with ThreadPoolExecutor(1) as pool:
            wrong = pool.submit(test, kernel, call).result()
    except Exception as error:  # errors of the library, a new signature, a missing build
        return f"fails on this machine ({brief(error)})"
    return f"gives wrong results on this machine ({wrong})" if wrong else ""


def _without_dropout(kernel: Kernel, call: AttentionCall) -> str:
    if call.window is not None:
        call = replace(call, window=min(call.window, TEST_WINDOW))
    row = _Row.random(call, TEST_LENGTHS)
    return _difference(row.through(kernel, call), row.reference(call, None), call.dtype)


def _with_dropout(kernel: Kernel, call: AttentionCall) -> str:
    """Values that are unit vectors make the output equal to the attention weights, which shows
    which were dropped; the same seed drops the same weights for other values."""
    call = replace(call, dropout=TEST_DROPOUT, window=call.window and min(call.window, 4))
    if call.value_width < max(DROPOUT_LENGTHS):
        return f"head size {call.value_width} is too small to test dropout"
    row = _Row.random(call, DROPOUT_LENGTHS)
    unit = row.value.detach().zero_()
    for start, end in row.samples:
        unit[start:end, :, : end - start] = torch.eye(end - start)[:, None].to(unit)
    devices = [call.device] if call.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        weights = kernel(row.query, row.key, unit, row.cu_seqlens, row.longest, call).detach()
        torch.manual_seed(0)
        ours = row.through(kernel, call)
    kept = [(weights[a:b, :, : b - a] != 0).transpose(0, 1) for a, b in row.samples]
    share = sum(x.tril().sum().item() for x in kept) / (
        sum(x.shape[0] * row.mask(x.shape[1], call.window).sum().item() for x in kept)
    )
    if not 0.3 < share < 0.7:
        return f"keeps {share:.0%} of the attention weights at a dropout of {TEST_DROPOUT:.0%}"
    return _difference(ours, row.reference(call, kept), call.dtype)


@dataclass
class _Row:
    """Random queries, keys, values and grad_output of a packed row."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_output: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def random(cls, call: AttentionCall, lengths: tuple[int, ...]) -> _Row:
        generator = torch.Generator().manual_seed(0)
        total = sum(lengths)

        def random(heads: int, width: int) -> Tensor:
            x = torch.randn(total, heads, width, generator=generator)
            return x.to(call.device, call.dtype)

        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(
            random(call.heads, call.width).requires_grad_(),
            random(call.kv_heads, call.width).requires_grad_(),
            random(call.kv_heads, call.value_width).requires_grad_(),
            random(call.heads, call.value_width),
            ends.to(call.device),
            lengths,
        )

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def samples(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *itertools.accumulate(self.lengths)]))

    def mask(self, length: int, window: int | None) -> Tensor:
        """``[queries, keys]``, True where a query attends to a key."""
        mask = torch.ones(length, length, dtype=torch.bool, device=self.query.device).tril()
        return mask if window is None else mask.triu(1 - window)

    def through(self, kernel: Kernel, call: AttentionCall) -> list[Tensor]:
        """Output and gradients of queries, keys and values, by `kernel`."""
        inputs = self.query, self.key, self.value
        out = kernel(*inputs, self.cu_seqlens, self.longest, call)
        return [out, *torch.autograd.grad(out, inputs, self.grad_output)]

    def reference(self, call: AttentionCall, kept: list[Tensor] | None) -> list[Tensor]:
        """The same by the formula, in float64; `kept` marks the weights that were not dropped."""
        inputs = [x.detach().double().requires_grad_() for x in (self.query, self.key, self.value)]
        outs, group = [], call.heads // call.kv_heads
        for i, (start, end) in enumerate(self.samples):
            q, k, v = (x[start:end].transpose(0, 1) for x in inputs)
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = q @ k.mT * call.scale
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            hidden = ~self.mask(end - start, call.window)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            if kept is not None:
                weights = weights * kept[i] / (1 - call.dropout)
            outs.append((weights @ v).transpose(0, 1))
        out = torch.cat(outs)
        return [out, *torch.autograd.grad(out, inputs, self.grad_output.double())]


def _difference(ours: list[Tensor], reference: list[Tensor], dtype: torch.dtype) -> str:
    """The first of output and gradients that differs, and its relative error."""
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, got, wanted in zip(names, ours, reference, strict=True):
        got, wanted = got.detach().double(), wanted.detach()
        error = float((got - wanted).norm() / wanted.norm())
        if not error <= TOLERANCE.get(dtype, 2e-2):  # also catches nan
            return f"relative error of the {name} is {error:.2g}"
    return ""
