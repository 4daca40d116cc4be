"""Cut a packed row into blocks of queries, each with the keys that it attends to."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Queries per block; the keys of a block also start at a multiple of it."""

MAX_SAVED_KEYS = 512
"""Blocks with at most this many keys save their weights for the backward pass; others recompute
them."""

MAX_SCORES = 2**22
"""Maximum number of scores per product; 16 MiB in float32, which fits into the cache."""


@dataclass(frozen=True)
class Blocks:
    """A batch of blocks of the same shape.

    Attributes:
        part: Slice of the blocks in the order of `Layout`.
        width: Number of keys of a block.
        rows: Indices of the keys into rows of ``[kv_heads * N, D]``, ``[n * kv_heads * w]``.
        starts: The first key of each block.
        within: The range of keys (first, last + 1), relative to `starts`, that each query attends
            to; int32 ``[n, b]``.
    """

    part: slice
    width: int
    rows: Tensor
    starts: tuple[int, ...]
    within: tuple[Tensor, Tensor]

    @property
    def saves_weights(self) -> bool:
        """Whether the attention weights are saved for the backward pass."""
        return self.width <= MAX_SAVED_KEYS

    @cached_property
    def starts_tensor(self) -> Tensor:
        """`starts` as an int64 tensor ``[n]``."""
        return torch.tensor(self.starts)

    @cached_property
    def bias(self) -> Tensor:
        """``[n, 1, b, w]``, 0 where a query attends to a key, else -inf."""
        keys = torch.arange(self.width, device=self.rows.device)
        first, last = (x[..., None] for x in self.within)
        hidden = ((keys < first) | (keys >= last))[:, None]
        return torch.zeros(hidden.shape, device=keys.device).masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class Layout:
    """The blocks of a row of `total` tokens, grouped by their number of keys.

    `total` is a multiple of `BLOCK`. `order` sorts blocks with the same number of keys together;
    each entry of `shapes` is (index of the first block, number of keys, first key of each block).
    """

    cu_seqlens: tuple[int, ...]
    window: int | None
    total: int
    order: Tensor
    shapes: tuple[tuple[int, int, tuple[int, ...]], ...]

    @property
    def widest(self) -> int:
        """The largest number of keys of a block."""
        return max((width for _, width, _ in self.shapes), default=0)

    @property
    def pairs(self) -> int:
        """Number of pairs of query and key that are multiplied."""
        return sum(BLOCK * width * len(starts) for _, width, starts in self.shapes)


@lru_cache(maxsize=8)
def layout_of(cu_seqlens: tuple[int, ...], window: int | None) -> Layout:
    """Cut a row with samples at `cu_seqlens` into blocks."""
    total = -(-cu_seqlens[-1] // BLOCK) * BLOCK
    found: dict[int, list[tuple[int, int]]] = {}
    for first in range(0, total, BLOCK):
        start = cu_seqlens[bisect.bisect_right(cu_seqlens, first) - 1]
        if window is not None:
            start = max(start, first - window + 1)
        start -= start % BLOCK
        found.setdefault(first + BLOCK - start, []).append((first // BLOCK, start))
    order = [block for blocks in found.values() for block, _ in blocks]
    shapes, first = [], 0
    for width, blocks in found.items():
        shapes.append((first, width, tuple(start for _, start in blocks)))
        first += len(blocks)
    return Layout(cu_seqlens, window, total, torch.tensor(order), tuple(shapes))


def _make_blocks(
    layout: Layout, heads: int, kv_heads: int, device: torch.device
) -> Iterator[Blocks]:
    padded = (*layout.cu_seqlens, layout.total)  # the padding is a sample of its own
    start_of = torch.repeat_interleave(
        torch.tensor(padded[:-1]), torch.tensor(padded).diff(), output_size=layout.total
    )
    for first, width, all_starts in layout.shapes:
        at_once = max(1, MAX_SCORES // (heads * BLOCK * width))
        for i in range(0, len(all_starts), at_once):
            starts = all_starts[i : i + at_once]
            part = slice(first + i, first + i + len(starts))
            q = (layout.order[part] * BLOCK)[:, None] + torch.arange(BLOCK)
            seen = start_of[q]
            if layout.window is not None:
                seen = torch.maximum(seen, q - layout.window + 1)
            k = torch.tensor(starts)[:, None]
            within = [(seen - k).clamp(min=0).int().to(device), (q + 1 - k).int().to(device)]
            heads_of = torch.arange(kv_heads)[:, None] * layout.total
            rows = (k[..., None] + heads_of + torch.arange(width)).flatten().to(device)
            yield Blocks(part, width, rows, starts, (within[0], within[1]))


@lru_cache(maxsize=4)
def shared_blocks(*key: Any) -> tuple[Blocks, ...]:
    """The blocks of a row, cached; arguments as for `blocks_of`."""
    return tuple(_make_blocks(*key))


def blocks_of(layout: Layout, heads: int, kv_heads: int, device: torch.device) -> Iterable[Blocks]:
    """The blocks of a row, shared by all layers unless they would take too much memory."""
    make = shared_blocks if layout.pairs <= MAX_SCORES else _make_blocks
    return make(layout, heads, kv_heads, device)
