"""Sequence parallelism: the processes of a group share the tokens of a row (DeepSpeed-Ulysses,
Jacobs et al. 2023, arXiv:2309.14509).

    tokens / n, all heads ──all-to-all──► all tokens, heads / n ──attention──► all-to-all ──► back

Every layer except attention works on the process's own tokens. Before attention the processes
exchange tokens for heads, so each computes plain attention over the entire row for some of the
heads: packed samples, windows and all kernels work as on a single process. A key-value head that
query heads of several processes read is sent to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtuner.errors import count
from xtuner.parallel.collective import waiting


@dataclass(frozen=True)
class HeadShare:
    """The heads of one process of a group.

    Attributes:
        queries: Its query heads.
        keys: The key-value heads that they read.
        repeat: For each query head, the index in `keys` of the head that it reads; None if query
            head h reads ``h // (len(queries) / len(keys))``, as attention assumes.
    """

    queries: range
    keys: range
    repeat: tuple[int, ...] | None


@cache
def share_heads(heads: int, kv_heads: int, size: int) -> tuple[HeadShare, ...]:
    """Split `heads` into `size` shares that differ by at most one head.

    Raises:
        ValueError: There are fewer heads than shares.
    """
    if size > heads:
        raise ValueError(f"{count(heads, 'attention head')} cannot be shared by {size} processes")
    group = heads // kv_heads
    shares = []
    for rank in range(size):
        queries = range(rank * heads // size, (rank + 1) * heads // size)
        keys = range(queries[0] // group, queries[-1] // group + 1)
        reads = tuple(head // group - keys.start for head in queries)
        even = len(queries) % len(keys) == 0
        assumed = tuple(i // (len(queries) // len(keys)) for i in range(len(queries)))
        shares.append(HeadShare(queries, keys, None if even and reads == assumed else reads))
    return tuple(shares)


class SequenceGroup:
    """The processes that share the tokens of a row.

    Args:
        group: The torch.distributed group.
        rank: Rank of this process in the group.
        size: Number of processes.
    """

    def __init__(self, group: Any, *, rank: int, size: int) -> None:
        self._group, self.rank, self.size = group, rank, size

    def __deepcopy__(self, memo: Any) -> SequenceGroup:
        return self

    def share(self, num_tokens: int) -> slice:
        """This process's part of `num_tokens`, a multiple of `size`."""
        part = num_tokens // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send ``sent[r]`` elements of `flat` to each process r and return what they send, in rank
        order; collective."""
        out = flat.new_empty(sum(received))
        with waiting("the exchange of heads"):
            dist.all_to_all_single(out, flat, received, sent, group=self._group)
        return out

    def sum(self, tensor: Tensor) -> None:
        """Sum `tensor` over the group, in place; collective."""
        with waiting("the scores of a row"):
            dist.all_reduce(tensor, group=self._group)


class PretendedGroup(SequenceGroup):
    """Stands in for the first of `size` processes: tensors have the right shapes and no values, for
    memory forecasts."""

    def __init__(self, size: int) -> None:
        super().__init__(None, rank=0, size=size)

    def exchange(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """A tensor of the size of what would be received."""
        return flat.new_empty(sum(received))

    def sum(self, tensor: Tensor) -> None:
        """Do nothing."""


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, group: SequenceGroup, sent: list[int], received: list[int]
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return group.exchange(flat, sent, received)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        back = ctx.group.exchange(grads[0].contiguous(), ctx.received, ctx.sent)
        return back, None, None, None


def tokens_to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange this process's tokens of all heads for all tokens of its heads, in one message.

    Args:
        query: ``[T, heads, D]`` for T of the N tokens.
        key: ``[T, kv_heads, D]``.
        value: ``[T, kv_heads, V]``.
        group: The processes that share the row.

    Returns:
        ``[N, own heads, D]``, and keys and values of the heads that these read.
    """
    tokens, heads, width = query.shape
    kv_heads, value_width = value.shape[1:]
    shares = share_heads(heads, kv_heads, group.size)

    def numbers(share: HeadShare) -> tuple[int, int, int]:
        queries, keys = len(share.queries), len(share.keys)
        return tokens * queries * width, tokens * keys * width, tokens * keys * value_width

    parts = [
        x[:, heads_of.start : heads_of.stop].reshape(-1)
        for share in shares
        for x, heads_of in ((query, share.queries), (key, share.keys), (value, share.keys))
    ]
    own = shares[group.rank]
    sent = [sum(numbers(share)) for share in shares]
    received = [sum(numbers(own))] * group.size
    flat: Tensor = _AllToAll.apply(torch.cat(parts), group, sent, received)  # type: ignore[no-untyped-call]
    q, k, v = flat.view(group.size, -1).split(numbers(own), dim=1)
    row = tokens * group.size
    q = q.reshape(row, len(own.queries), width)
    k, v = k.reshape(row, len(own.keys), width), v.reshape(row, len(own.keys), value_width)
    if own.repeat is not None:
        reads = torch.tensor(own.repeat, device=k.device)
        k, v = k.index_select(1, reads), v.index_select(1, reads)
    return q, k, v


def heads_to_tokens(out: Tensor, heads: int, group: SequenceGroup) -> Tensor:
    """Exchange all tokens of this process's heads for its own tokens of all heads.

    Args:
        out: ``[N, own heads, V]``.
        heads: Number of heads of all processes together.
        group: The processes that share the row.

    Returns:
        ``[T, heads, V]``.
    """
    row, own, width = out.shape
    tokens = row // group.size
    counts = [len(share.queries) for share in share_heads(heads, heads, group.size)]
    sent = [tokens * own * width] * group.size
    received = [tokens * count * width for count in counts]
    flat: Tensor = _AllToAll.apply(out.reshape(-1), group, sent, received)  # type: ignore[no-untyped-call]
    parts = flat.split(received)
    return torch.cat(
        [part.view(tokens, count, width) for part, count in zip(parts, counts, strict=True)], dim=1
    )


class _GatherScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: SequenceGroup, start: int, count: int) -> Tensor:
        ctx.part = slice(start, start + len(own))
        scores = own.new_zeros(count)
        scores[ctx.part] = own
        group.sum(scores)
        return scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return grads[0][ctx.part], None, None, None


def gather_scores(own: Tensor, group: SequenceGroup, *, start: int, count: int) -> Tensor:
    """The scores of all processes, ``[count]``, in which `own` start at `start`. Every process
    computes the same loss from them, so each gets the gradient of its own scores only. Weight
    gradients must then be summed over the group.
    """
    scores: Tensor = _GatherScores.apply(own, group, start, count)  # type: ignore[no-untyped-call]
    return scores
