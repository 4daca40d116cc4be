"""Log-probabilities of supervised tokens from hidden states, without materializing all logits.

The full logits of 1,024 tokens and a vocabulary of 49,152 take 200 MB in float32, and most rows
belong to tokens that are not supervised. Only supervised positions are multiplied with the output
head, in chunks. The gradients of the hidden states (and of the head, if it is trained) are computed
in the same pass for a grad_output of 1, so that no logits are saved; the backward pass scales them
row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.kernels.compiled import kernels_for
from xtuner.kernels.scratch import scratch_buffer

LOGITS_BYTES = 64 * 2**20
"""Maximum size of the logits of one chunk."""


def chunk_rows(positions: int, vocabulary: int, bytes_each: int) -> int:
    """Positions per chunk: the fewest equal chunks that fit into `LOGITS_BYTES`.

    Rounded up to a multiple of 16, or of 64 for large chunks: for each number of rows torch's
    matrix library caches half a MiB of generated code.
    """
    most = max(16, LOGITS_BYTES // (bytes_each * vocabulary))
    parts = -(-positions // most) or 1
    step = 64 if positions > 256 * parts else 16
    return -(-positions // (parts * step)) * step


def _matmul(a: Tensor, b: Tensor, out: Tensor, *, across: bool = False) -> Tensor:
    """``a b``, or ``a b^T`` if `across`, in `out`."""
    return torch.matmul(a, b.T if across else b, out=out)


def _with_gradient(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """Loss of each row of ``logits [S, V]``, float32 ``[S]``; with `gradient`, logits are
    overwritten by their gradient."""
    kernels = kernels_for(logits)
    if kernels is not None:
        return kernels.cross_entropy(logits, targets.contiguous(), gradient)
    wide = torch.promote_types(logits.dtype, torch.float32)
    softmax = scratch_buffer("softmax", logits.numel(), wide, logits.device).view_as(logits)
    largest = logits.amax(-1, keepdim=True).to(wide)
    softmax.copy_(logits).sub_(largest).exp_()  # torch.softmax would allocate another copy
    total = softmax.sum(-1, keepdim=True)
    losses = largest - logits.gather(1, targets) + total.log()
    if gradient:
        softmax.scatter_add_(1, targets, -total)
        logits.copy_(softmax.div_(total))
    return losses[:, 0]


def _add_product(total: Tensor, error: Tensor, rows: Tensor) -> None:
    """Add ``error^T rows`` to a float32 `total`; errors are at most 1.

    In float16 a sum over many rows can overflow at any loss scale, so rows are first scaled down
    by a power of two.
    """
    if error.dtype != torch.float16:
        total += error.T @ rows
        return
    largest = rows.abs().amax().float()
    small = torch.exp2(torch.floor(torch.log2(2.0**15 / (len(rows) * largest))))
    small = small.clamp(max=2.0**15)
    product = error.T @ (rows * small.half())
    total += product.float() / small


class _Chunks:
    """The products of ``hidden [S, H]`` with the head ``[V, H]``, one chunk of rows at a time."""

    def __init__(self, hidden: Tensor, head: Tensor, targets: Tensor):
        self.hidden, self.head, self.targets = hidden, head, targets
        dtype, count = head.dtype, len(targets)
        kernels = kernels_for(hidden.new_empty(0, dtype=dtype), head)
        extra = 0 if kernels else 4  # the float32 softmax
        self.step = chunk_rows(count, len(head), torch.finfo(dtype).bits // 8 + extra)
        all_logits = scratch_buffer("logits", self.step * len(head), dtype, hidden.device)
        self._logits = all_logits.view(self.step, len(head))
        # torch's products are padded to `step` rows; see `chunk_rows`
        self._exact = kernels is not None and all(map(kernels.multiplies, head.shape))
        self.product = kernels.product if kernels is not None and self._exact else _matmul
        self._rows = hidden.new_zeros(self.step, hidden.shape[1], dtype=dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Yield (slice of S, hidden rows, logits, targets ``[n, 1]``); hidden rows and logits are
        padded to `step` rows unless the kernels take any number of rows."""
        for start in range(0, len(self.targets), self.step or 1):
            part = slice(start, start + self.step)
            wanted = self.targets[part, None]
            count = len(wanted)
            used = count if self._exact else self.step
            self._rows[:count] = self.hidden[part]
            self._rows[count:] = 0
            rows = self._rows[:used]
            logits = self.product(rows, self.head, self._logits[:used], across=True)
            yield part, rows, logits, wanted


class _LogProbabilities(torch.autograd.Function):
    """``log softmax(h_i W^T)[t_i]``; gradients ``g_i (onehot - softmax) W`` and ``sum_i g_i (onehot
    - softmax)^T h_i``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Compute the loss and save its gradients: hidden ``[S, H]``, weight ``[V, H]``, targets
        ``[S]``."""
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        wide = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        losses = hidden.new_empty(len(targets), dtype=wide)
        chunks = _Chunks(hidden, weight.to(dtype), targets)
        scratch = hidden.new_empty(chunks.step, hidden.shape[1], dtype=dtype)
        for part, rows, error, wanted in chunks:
            count = len(wanted)
            losses[part] = _with_gradient(
                error[:count], wanted, gradient=need_hidden or need_weight
            )
            if grad_hidden is not None:
                grad_hidden[part] = chunks.product(error, chunks.head, scratch[: len(rows)])[:count]
            if grad_weight is not None:
                _add_product(grad_weight, error, rows)
        again = (hidden, weight, targets) if need_weight else (None, None, None)
        ctx.save_for_backward(grad_hidden, grad_weight, *again)
        ctx.weight_dtype, ctx.dtype = weight.dtype, dtype
        return losses.neg_()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the gradients that the forward pass computed."""
        grad_hidden, grad_weight, *again = ctx.saved_tensors
        grad = grad_output.neg()
        if grad_hidden is not None and ctx.dtype == torch.float16:
            # the loss scale divided by the number of tokens may underflow in float16
            grad_hidden = (grad_hidden.float() * grad[:, None]).to(grad_hidden.dtype)
        elif grad_hidden is not None:
            grad_hidden = grad_hidden * grad[:, None].to(grad_hidden.dtype)
        if grad_weight is not None:
            # a grad_output of stride 0 (the gradient of a sum) is known to be equal in every row
            # without reading its values, which would synchronize with a GPU
            if len(grad) and grad_output.stride() == (0,):
                grad_weight = grad_weight * grad[0]
            else:
                grad_weight = _weighted_by_row(grad, again, ctx.dtype)
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def _weighted_by_row(grad: Tensor, inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The gradient of the head, float32 ``[V, H]``, for a grad_output ``[S]`` that differs between
    rows: recomputes the logits."""
    hidden, weight, targets = inputs
    total = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
    for part, rows, error, wanted in _Chunks(hidden, weight.to(dtype), targets):
        count = len(wanted)
        _with_gradient(error[:count], wanted, gradient=True)
        scaled = rows.to(total.dtype)
        scaled[:count] *= grad[part, None]
        _add_product(total, error, scaled.to(rows.dtype))
    return total


def log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probability of each target, for an output head without bias.

    Args:
        hidden: Last hidden states of the supervised positions, ``[S, H]``.
        weight: The head, ``[V, H]``; gets a gradient if it requires one.
        targets: int64 ``[S]``.

    Returns:
        float32 ``[S]``, or float64 for float64 states. Products use the autocast dtype if autocast
        is enabled, else the dtype of `hidden`.
    """
    if not torch.is_grad_enabled():  # needs_input_grad of a Function ignores no_grad
        hidden, weight = hidden.detach(), weight.detach()
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        found: Tensor = _LogProbabilities.apply(hidden, weight, targets, dtype)  # type: ignore[no-untyped-call]
        return found


class ScoringHead:
    """The forward pass of an output head that scores targets; see `with_forward`.

    The head is called through `__call__`, so that hooks that gather sharded weights run.
    """

    def forward(self: Any, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits ``[..., V]`` for ``[..., H]``, or the log-probability of each target."""
        if targets is None:
            logits: Tensor = super().forward(hidden)  # type: ignore[misc]
            return logits
        return log_probabilities(hidden, self.weight, targets)


def log_probabilities_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """`log_probabilities` from logits ``[S, V]``, for heads that are not a single matrix."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")
