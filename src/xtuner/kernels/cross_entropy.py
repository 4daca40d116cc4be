"""The summed cross-entropy of supervised tokens, from hidden states, without ever holding all
logits.

A full logits matrix of 1,024 tokens and 49,152 words takes 200 MB in float32, and most rows of it
belong to tokens that are not supervised. Here only supervised positions are multiplied with the
output head, some at a time, and the gradients of the hidden states (and of the head, when it is
trained) are computed in the same pass, so that no logits are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.kernels.compiled import kernels_for
from xtuner.kernels.scratch import workspace

LOGITS_BYTES = 64 * 2**20
"""Room for the logits of the positions that are multiplied with the head at once."""


def chunk_rows(positions: int, vocabulary: int, bytes_each: int) -> int:
    """How many positions are multiplied with the head at once: equal parts, as few as have room.

    Multiples of 16, and of 64 where they are many: for each number of rows torch's matrix library
    keeps half a MiB of code.
    """
    room = max(16, LOGITS_BYTES // (bytes_each * vocabulary))
    parts = -(-positions // room) or 1
    step = 64 if positions > 256 * parts else 16
    return -(-positions // (parts * step)) * step


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, across: bool = False) -> Tensor:
    """``a b``, or ``a b^T`` if `across`, in `out`."""
    return torch.matmul(a, b.T if across else b, out=out)


def _with_gradient(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Summed loss of ``logits [S, V]``, in float32; with `gradient` the logits become theirs."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.cross_entropy(logits, targets.contiguous(), gradient).sum()
    wide = torch.promote_types(logits.dtype, torch.float32)
    shares = workspace("shares", logits.numel(), wide, logits.device).view_as(logits)
    largest = logits.amax(-1, keepdim=True).to(wide)
    shares.copy_(logits).sub_(largest).exp_()  # torch.softmax would hold a copy of them beside
    whole = shares.sum(-1, keepdim=True)
    total = (largest - logits.gather(1, targets) + whole.log()).sum()
    if gradient:
        shares.scatter_add_(1, targets, -whole)
        logits.copy_(shares.div_(whole))
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """``sum_i -log softmax(h_i W^T)[t_i]``; gradients ``(softmax - onehot) W`` and ``(softmax -
    onehot)^T h``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Sum the loss and keep the finished gradients: hidden ``[S, H]``, weight ``[V, H]``,
        targets ``[S]``."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        head = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden.new_zeros((), dtype=torch.float32)
        size = torch.finfo(dtype).bits // 8
        kernels = kernels_for(hidden.new_empty(0, dtype=dtype), head)
        beside = 0 if kernels else 4  # float32 shares
        step = chunk_rows(len(targets), len(head), size + beside)
        all_logits = workspace("logits", step * len(head), dtype, hidden.device)
        all_logits = all_logits.view(step, len(head))
        # torch's matrix library takes rows of nothing beside the others; see `chunk_rows`
        exact = kernels is not None and all(map(kernels.multiplies, head.shape))
        product = kernels.product if kernels is not None and exact else _matmul
        rows = hidden.new_zeros(step, hidden.shape[1], dtype=dtype)
        pulled = torch.empty_like(rows) if need_hidden else None
        for start in range(0, len(targets), step or 1):
            part = slice(start, start + step)
            wanted = targets[part, None]
            count = len(wanted)
            used = count if exact else step
            rows[:count] = hidden[part]
            rows[count:] = 0
            error = product(rows[:used], head, all_logits[:used], across=True)
            total += _with_gradient(error[:count], wanted, gradient=need_hidden or need_weight)
            if grad_hidden is not None and pulled is not None:
                grad_hidden[part] = product(error, head, pulled[:used])[:count]
            if grad_weight is not None:
                grad_weight += error.T @ rows[:used]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients that the forward pass finished."""
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad).to(ctx.weight_dtype),
            None,
            None,
        )


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum of ``-log p(target)`` over positions, for an output head without bias.

    Args:
        hidden: ``[S, H]``, last hidden states of the supervised positions.
        weight: ``[V, H]``, the head; gets a gradient if it requires one.
        targets: int64 ``[S]``.

    Returns:
        A float32 scalar. Products are taken in autocast's type where autocast is on, else in that
        of `hidden`.
    """
    if not torch.is_grad_enabled():  # inside a Function all inputs still seem to need gradients
        hidden, weight = hidden.detach(), weight.detach()
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        total: Tensor = _SummedCrossEntropy.apply(hidden, weight, targets, dtype)  # type: ignore[no-untyped-call]
        return total


def cross_entropy_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The same sum from logits ``[S, V]``: the plain formula, for heads that are not a single
    matrix."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")
