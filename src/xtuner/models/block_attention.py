"""Causal attention of packed samples on a CPU, in equal blocks and with few large products.

The row is cut into blocks of `BLOCK` queries. A block sees the keys from the first token of its
first sample (or from where its sliding window begins) to its own end, so hardly any work goes to
pairs of different samples or to later keys. Blocks that see equally many keys are multiplied
together: a few shapes only, whatever the lengths of the samples (each new shape costs oneDNN a
compilation). The backward pass is written out:

    P = softmax(s Q K^T),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(dP * P)),  dQ = s dS K,  dK = s dS^T Q

torch's own kernel for CPUs takes twice to three times as long, most of it in its backward pass.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
"""Queries in a block; the keys that it sees begin at a multiple of this, too."""

KEPT_KEYS = 512
"""Blocks that see at most so many keys keep their weights for the backward pass; others
recompute."""

SCORES = 2**22
"""Scores computed at once; 16 MiB in float32, which stays in the cache."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of one shape, all at once.

    Attributes:
        part: which of the blocks, in the order of `Layout`.
        rows: the keys that they see, ``[n * kv_heads * w]``, as rows of ``[kv_heads * N, D]``.
        starts: the first key of each block.
        bias: ``[n, 1, b, w]``, 0 where a query sees a key, else -inf.
    """

    part: slice
    rows: Tensor
    starts: tuple[int, ...]
    bias: Tensor

    @property
    def width(self) -> int:
        """Keys that a block sees."""
        return self.bias.shape[-1]

    @property
    def keeps_weights(self) -> bool:
        """Whether the attention weights wait for the backward pass."""
        return self.width <= KEPT_KEYS


@dataclass(frozen=True)
class Layout:
    """How the blocks of a row of `total` tokens see each other.

    `total` is a multiple of `BLOCK`. `order` puts blocks that see equally many keys side by side;
    ``shapes`` says for each such number of keys which blocks these are and where their keys begin.
    """

    borders: tuple[int, ...]
    window: int | None
    total: int
    order: Tensor
    shapes: tuple[tuple[int, int, tuple[int, ...]], ...]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that are multiplied."""
        return sum(BLOCK * width * len(starts) for _, width, starts in self.shapes)


@lru_cache(maxsize=8)
def layout_of(borders: tuple[int, ...], window: int | None) -> Layout:
    """Cut a row into blocks; the samples lie between `borders`."""
    total = -(-borders[-1] // BLOCK) * BLOCK
    found: dict[int, list[tuple[int, int]]] = {}
    for first in range(0, total, BLOCK):
        start = borders[bisect.bisect_right(borders, first) - 1]
        if window is not None:
            start = max(start, first - window + 1)
        start -= start % BLOCK
        found.setdefault(first + BLOCK - start, []).append((first // BLOCK, start))
    order = [block for blocks in found.values() for block, _ in blocks]
    shapes, first = [], 0
    for width, blocks in found.items():
        shapes.append((first, width, tuple(start for _, start in blocks)))
        first += len(blocks)
    return Layout(borders, window, total, torch.tensor(order), tuple(shapes))


def _make_blocks(
    layout: Layout, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Blocks]:
    padded = (*layout.borders, layout.total)  # the padding is a sample that nobody sees
    start_of = torch.repeat_interleave(
        torch.tensor(padded[:-1]), torch.tensor(padded).diff(), output_size=layout.total
    )
    for first, width, starts in layout.shapes:
        at_once = max(1, SCORES // (heads * BLOCK * width))
        for i in range(0, len(starts), at_once):
            chosen = starts[i : i + at_once]
            part = slice(first + i, first + i + len(chosen))
            q = (layout.order[part] * BLOCK)[:, None] + torch.arange(BLOCK)
            k = torch.tensor(chosen)[:, None] + torch.arange(width)
            start = start_of[q]
            if layout.window is not None:
                start = torch.maximum(start, q - layout.window + 1)
            hidden = (k[:, None, :] > q[:, :, None]) | (k[:, None, :] < start[:, :, None])
            bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
            rows = k[:, None, :] + torch.arange(kv_heads)[:, None] * layout.total
            yield Blocks(part, rows.flatten().to(device), chosen, bias[:, None].to(device))


@lru_cache(maxsize=4)
def _shared_blocks(*key: Any) -> tuple[Blocks, ...]:
    return tuple(_make_blocks(*key))


def _blocks(layout: Layout, query: Tensor, key: Tensor) -> Iterable[Blocks]:
    """The blocks of a row; all layers share them unless they would take much memory."""
    make = _shared_blocks if layout.pairs <= SCORES else _make_blocks
    return make(layout, query.shape[1], key.shape[1], query.dtype, query.device)


class _BlockAttention(torch.autograd.Function):
    """``[N, heads, D]``, ``[N, kv_heads, D]``, ``[N, kv_heads, V]`` to ``[N, heads, V]``."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        kv_heads = key.shape[1]
        q, k, v = (
            _in_blocks(query, layout, kv_heads),
            _by_head(key, layout),
            _by_head(value, layout),
        )
        out = q.new_empty(*q.shape[:-1], value.shape[-1])
        kept = []
        for blocks in _blocks(layout, query, key):
            weights = _weights(q, k, blocks, scale)
            torch.matmul(weights, _seen(v, blocks, kv_heads), out=out[blocks.part])
            if blocks.keeps_weights and any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.options = layout, scale
        return _in_row(out, layout, query.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *kept = ctx.saved_tensors
        layout, scale = ctx.options
        kv_heads, wide = key.shape[1], torch.promote_types(query.dtype, torch.float32)
        q, k, v = (
            _in_blocks(query, layout, kv_heads),
            _by_head(key, layout),
            _by_head(value, layout),
        )
        grad = _in_blocks(grad, layout, kv_heads)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        waiting = iter(kept)
        for blocks in _blocks(layout, query, key):
            part = blocks.part
            weights = next(waiting) if blocks.keeps_weights else _weights(q, k, blocks, scale)
            grad_weights = grad[part] @ _seen(v, blocks, kv_heads).mT
            _add_seen(grad_v, blocks, weights.mT @ grad[part])
            scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            torch.matmul(scores, _seen(k, blocks, kv_heads), out=grad_q[part])
            _add_seen(grad_k, blocks, scores.mT @ q[part])
        grad_query = _in_row(grad_q.mul_(scale), layout, query.shape[0])
        grad_key = grad_k.mul_(scale).transpose(0, 1)[: key.shape[0]].to(key.dtype)
        grad_value = grad_v.transpose(0, 1)[: key.shape[0]].to(value.dtype)
        return grad_query, grad_key, grad_value, None, None


def _weights(q: Tensor, k: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Attention weights ``[n, kv_heads, group * b, w]``; exponentials are summed in float32."""
    chosen = q[blocks.part]
    scores = chosen @ _seen(k, blocks, q.shape[1]).mT
    by_query = scores.view(len(scores), -1, BLOCK, blocks.width)
    torch.add(blocks.bias, by_query, alpha=scale, out=by_query)
    return torch.softmax(scores, -1)


def _in_blocks(x: Tensor, layout: Layout, kv_heads: int) -> Tensor:
    """``[N, heads, D]`` as ``[blocks, kv_heads, group * b, D]``, in the layout's order."""
    x = F.pad(x, (0, 0, 0, 0, 0, layout.total - x.shape[0]))
    width = x.shape[2]
    x = x.view(layout.total // BLOCK, -1).index_select(0, layout.order)
    x = x.view(len(x), BLOCK, -1, width).transpose(1, 2)
    return x.contiguous().view(len(x), kv_heads, -1, width)


def _in_row(x: Tensor, layout: Layout, total: int) -> Tensor:
    """``[blocks, kv_heads, group * b, D]`` as ``[N, heads, D]``."""
    num_blocks, width = len(x), x.shape[-1]
    x = x.view(num_blocks, -1).index_select(0, layout.order.argsort())
    x = x.view(num_blocks, -1, BLOCK, width).transpose(1, 2)
    return x.reshape(layout.total, -1, width)[:total]


def _by_head(x: Tensor, layout: Layout) -> Tensor:
    """``[N, kv_heads, D]`` as ``[kv_heads, padded N, D]``."""
    out = x.new_zeros(x.shape[1], layout.total, x.shape[2])
    out[:, : x.shape[0]] = x.transpose(0, 1)
    return out


def _seen(x: Tensor, blocks: Blocks, kv_heads: int) -> Tensor:
    """Keys or values that the blocks see, ``[n, kv_heads, w, D]``."""
    rows = x.flatten(0, 1).index_select(0, blocks.rows)
    return rows.view(-1, kv_heads, blocks.width, x.shape[-1])


def _add_seen(target: Tensor, blocks: Blocks, x: Tensor) -> None:
    """Add ``[n, kv_heads, w, D]`` to the keys' places in ``[kv_heads, N, D]``; windows overlap."""
    for start, part in zip(blocks.starts, x, strict=True):
        target[:, start : start + blocks.width] += part


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row.

    Args:
        query: ``[N, heads, D]``.
        key: ``[N, kv_heads, D]``; query head h reads kv head ``h // (heads / kv_heads)``.
        value: ``[N, kv_heads, V]``.
        borders: where each sample begins, then N.
        scale: factor of the scores.
        window: a token sees itself and the ``window - 1`` tokens before it in its sample.

    Returns:
        ``[N, heads, V]``.
    """
    layout = layout_of(borders, window)
    out: Tensor = _BlockAttention.apply(query, key, value, layout, scale)  # type: ignore[no-untyped-call]
    return out
