"""Truncate, drop, split or reject rows of more than max_length tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from xtuner.config.schema import Settings
from xtuner.data.packing.order import Ints
from xtuner.data.packing.samples import SampleTable
from xtuner.data.tokenize.store import RowStore
from xtuner.types import Algorithm

Policy = Literal["truncate", "drop", "error", "split"]


@dataclass(frozen=True)
class Fitted:
    """The samples of one source, and the rows that were too long for one sample.

    Attributes:
        samples: The samples in the order of the rows.
        overlong: Numbers of the rows with more than max_length tokens.
        lost: The overlong rows without a sample.
    """

    samples: SampleTable
    overlong: Ints
    lost: Ints


def policy_of(settings: Settings, algorithm: Algorithm) -> Policy:
    """The setting `overlong` with 'auto' resolved."""
    return settings.overlong if settings.overlong != "auto" else cast(Policy, algorithm.overlong)


def fit(store: RowStore, *, source: int, max_length: int, policy: Policy) -> Fitted:
    """Make samples of the rows in `store`, with sequences of at most `max_length` tokens.

    'truncate' keeps the first tokens of each sequence; a row is lost if a sequence has no
    supervised token left, or none of its samples has one. 'error' drops overlong rows like 'drop';
    the caller raises the error.
    """
    overlong = np.flatnonzero(store.longest > max_length)
    complete = _uncut(store, source)
    if not len(overlong):
        return Fitted(complete, overlong, overlong)
    complete = complete.take(np.flatnonzero(~np.isin(complete.row, overlong)))
    if policy in ("drop", "error"):
        return Fitted(complete, overlong, overlong)
    cut = [_pieces(store, int(row), max_length, policy) for row in overlong]
    table = np.array([piece for pieces in cut for piece in pieces], dtype=np.int32).reshape(-1, 4)
    parts = SampleTable(np.full(len(table), source, dtype=np.int32), *table.T)
    lost = np.array(
        [row for row, pieces in zip(overlong, cut, strict=True) if not pieces], np.int64
    )
    return Fitted(_by_row([complete, parts]), overlong, lost)


def _uncut(store: RowStore, source: int) -> SampleTable:
    """The samples of all rows, at any length."""
    rows = np.arange(len(store), dtype=np.int32)
    table = SampleTable(
        np.full_like(rows, source), rows, np.zeros_like(rows), store.lengths, store.supervised
    )
    parts = store.parts
    if not len(parts.row):
        return table
    several = SampleTable(
        np.full_like(parts.row, source), parts.row, parts.start, parts.length, parts.supervised
    )
    single = np.delete(rows, np.unique(parts.row)).astype(np.int64)
    return _by_row([table.take(single), several])


def _by_row(tables: list[SampleTable]) -> SampleTable:
    """The samples in the order of the rows."""
    samples = SampleTable.joined(tables)
    return samples.take(np.lexsort((samples.start, samples.row)))


def kept_pieces(lengths: Sequence[int], max_length: int) -> list[tuple[int, int]]:
    """(start, length) of the part of each sequence of a row that 'truncate' keeps."""
    starts = itertools.accumulate(lengths, initial=0)
    return [(start, min(n, max_length)) for start, n in zip(starts, lengths, strict=False)]


def _pieces(
    store: RowStore, row: int, max_length: int, policy: Policy
) -> list[tuple[int, int, int, int]]:
    """(row, start, length, supervised) of each sample of an overlong row."""
    if policy == "truncate":
        kept = kept_pieces(store.sequences_of(row), max_length)
        counts = [store.count_supervised(row, start, length) for start, length in kept]
        if len(kept) > 1 and store.sequences_per_row == 1:
            return [(row, *piece, n) for piece, n in zip(kept, counts, strict=True) if n]
        return [(row, 0, sum(n for _, n in kept), sum(counts))] if all(counts) else []
    total = store.length(row)
    starts = list(range(0, total, max_length))
    if total - starts[-1] == 1:
        # a last piece of one token has nothing to predict, so it gets one from the previous piece
        starts[-1] -= 1
    lengths = np.diff([*starts, total]).tolist()
    return [
        (row, start, length, store.count_supervised(row, start, length))
        for start, length in zip(starts, lengths, strict=True)
    ]
