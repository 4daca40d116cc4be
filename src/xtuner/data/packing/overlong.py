"""What becomes of rows of more than max_length tokens: cut, dropped, split, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from xtuner.data.packing.order import Ints
from xtuner.data.packing.samples import SampleTable
from xtuner.data.tokenize.store import RowStore

Policy = Literal["truncate", "drop", "error", "split"]


@dataclass(frozen=True)
class Fitted:
    """The samples of one source, and the rows that were too long for one sample.

    Attributes:
        samples: in the order of the rows.
        overlong: numbers of the rows of more than max_length tokens.
        lost: those of them that no sample was made of.
    """

    samples: SampleTable
    overlong: Ints
    lost: Ints


def fit(store: RowStore, *, source: int, max_length: int, policy: Policy) -> Fitted:
    """Make samples of at most `max_length` tokens of the rows in `store`.

    'truncate' keeps the first tokens and loses a row without a supervised one among them; 'error'
    leaves too long rows out, as 'drop' does: refusing is the caller's part.
    """
    lengths = store.lengths
    overlong = np.flatnonzero(lengths > max_length)
    rows = np.arange(len(store), dtype=np.int32)
    whole = SampleTable(
        np.full_like(rows, source), rows, np.zeros_like(rows), lengths, store.supervised
    )
    if len(overlong):
        whole = whole.take(np.flatnonzero(lengths <= max_length))
    if policy in ("drop", "error") or not len(overlong):
        return Fitted(whole, overlong, overlong)
    cut = [_pieces(store, int(row), max_length, policy) for row in overlong]
    table = np.array([piece for pieces in cut for piece in pieces], dtype=np.int32).reshape(-1, 4)
    parts = SampleTable(np.full(len(table), source, dtype=np.int32), *table.T)
    samples = SampleTable.joined([whole, parts])
    by_row = np.lexsort((samples.start, samples.row))
    lost = np.array(
        [row for row, pieces in zip(overlong, cut, strict=True) if not pieces], np.int64
    )
    return Fitted(samples.take(by_row), overlong, lost)


def _pieces(
    store: RowStore, row: int, max_length: int, policy: Policy
) -> list[tuple[int, int, int, int]]:
    """(row, start, length, supervised) of each sample that is made of an overlong row."""
    total = store.length(row)
    if policy == "truncate":
        count = store.count_supervised(row, 0, max_length)
        return [(row, 0, max_length, count)] if count else []
    starts = list(range(0, total, max_length))
    if total - starts[-1] == 1:
        # a last piece of one token would predict nothing: it takes one from the piece before
        starts[-1] -= 1
    lengths = np.diff([*starts, total]).tolist()
    return [
        (row, start, length, store.count_supervised(row, start, length))
        for start, length in zip(starts, lengths, strict=True)
    ]
