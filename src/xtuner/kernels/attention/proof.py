"""Whether a kernel of attention gives the numbers of plain attention on this machine.

Its output and gradients for a small random row of several samples are compared with the formula in
float64, each sample alone.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xtuner.kernels.attention.call import AttentionCall, Kernel

PROOF_LENGTHS = (1, 3, 130, 64, 70)
"""Samples of the row of the proof: within, at, and beyond the blocks of 64 and 128 of kernels."""
PROOF_WINDOW = 20
"""A wider window is proved with this one, so that samples of the proof are longer than it."""
DROPOUT_LENGTHS = (5, 8, 1, 7)
"""With dropout no sample is longer than the narrowest head, so that weights can be read off."""
PROOF_DROPOUT = 0.5
TOLERANCE = {torch.float32: 2e-3}
"""Of the norm of the difference to that of the tensor; 2e-2 in 16 bits. Kernels round float32 to
TF32 (5e-4); a window that is one token too wide, or a neighbour that is seen, is beyond 5e-2."""


def fault_of(kernel: Kernel, call: AttentionCall) -> str:
    """What is wrong with results of `kernel`; empty if nothing is."""
    proof = _with_dropout if call.dropout else _without_dropout
    try:
        # Gradient mode, autocast and hooks on saved tensors (recomputation) of the caller are those
        # of its thread.
        with ThreadPoolExecutor(1) as pool:
            wrong = pool.submit(proof, kernel, call).result()
    except Exception as error:  # the library's own errors, a new signature, a missing build
        first = next(iter(str(error).splitlines()), "")
        return f"fails here ({type(error).__name__}: {first})"
    return f"gives wrong numbers here ({wrong})" if wrong else ""


def _without_dropout(kernel: Kernel, call: AttentionCall) -> str:
    if call.window is not None:
        call = replace(call, window=min(call.window, PROOF_WINDOW))
    row = _Row.random(call, PROOF_LENGTHS)
    return _difference(row.through(kernel, call), row.plainly(call, None), call.dtype)


def _with_dropout(kernel: Kernel, call: AttentionCall) -> str:
    """With values that are unit vectors the output is the attention weights, and tells which were
    dropped; the same seed drops the same for other values."""
    call = replace(call, dropout=PROOF_DROPOUT, window=call.window and min(call.window, 4))
    if call.value_width < max(DROPOUT_LENGTHS):
        return f"heads of {call.value_width} numbers are too narrow to tell"
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
        sum(x.shape[0] * row.seen(x.shape[1], call.window).sum().item() for x in kept)
    )
    if not 0.3 < share < 0.7:
        return f"keeps {share:.0%} of the weights at a dropout of {PROOF_DROPOUT:.0%}"
    return _difference(ours, row.plainly(call, kept), call.dtype)


@dataclass
class _Row:
    """Random queries, keys and values of several samples, and a gradient of the output."""

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

        def numbers(heads: int, width: int) -> Tensor:
            x = torch.randn(total, heads, width, generator=generator)
            return x.to(call.device, call.dtype)

        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(
            numbers(call.heads, call.width).requires_grad_(),
            numbers(call.kv_heads, call.width).requires_grad_(),
            numbers(call.kv_heads, call.value_width).requires_grad_(),
            numbers(call.heads, call.value_width),
            ends.to(call.device),
            lengths,
        )

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def samples(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise([0, *itertools.accumulate(self.lengths)]))

    def seen(self, length: int, window: int | None) -> Tensor:
        """``[queries, keys]``."""
        seen = torch.ones(length, length, dtype=torch.bool, device=self.query.device).tril()
        return seen if window is None else seen.triu(1 - window)

    def through(self, kernel: Kernel, call: AttentionCall) -> list[Tensor]:
        """Output and gradients of queries, keys and values, by `kernel`."""
        inputs = self.query, self.key, self.value
        out = kernel(*inputs, self.cu_seqlens, self.longest, call)
        return [out, *torch.autograd.grad(out, inputs, self.grad_output)]

    def plainly(self, call: AttentionCall, kept: list[Tensor] | None) -> list[Tensor]:
        """The same by the formula, in float64; `kept` are the weights that were not dropped."""
        inputs = [x.detach().double().requires_grad_() for x in (self.query, self.key, self.value)]
        outs, group = [], call.heads // call.kv_heads
        for i, (start, end) in enumerate(self.samples):
            q, k, v = (x[start:end].transpose(0, 1) for x in inputs)
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
            scores = q @ k.mT * call.scale
            if call.softcap is not None:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            hidden = ~self.seen(end - start, call.window)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            if kept is not None:
                weights = weights * kept[i] / (1 - call.dropout)
            outs.append((weights @ v).transpose(0, 1))
        out = torch.cat(outs)
        return [out, *torch.autograd.grad(out, inputs, self.grad_output.double())]


def _difference(ours: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> str:
    """The first of output and gradients that differs, and by how much."""
    names = ("output", "gradient of queries", "gradient of keys", "gradient of values")
    for name, got, wanted in zip(names, ours, plain, strict=True):
        got, wanted = got.detach().double(), wanted.detach()
        far = float((got - wanted).norm() / wanted.norm())
        if not far <= TOLERANCE.get(dtype, 2e-2):  # nan is far
            return f"{name} differs by {far:.2g}"
    return ""
