"""Index arrays of samples: which tokens of which row; the tokens stay on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from xtuner.data.packing.order import Ints
from xtuner.data.tokenize.store import RowStore

Ints32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SampleTable:
    """Samples as arrays ``[S]``, kept in memory: 20 bytes per sample.

    Attributes:
        source: Number of the source.
        row: Number of the row among the encoded rows of its source.
        start, length: The range of tokens of the row.
        supervised: Number of supervised tokens.
    """

    source: Ints32
    row: Ints32
    start: Ints32
    length: Ints32
    supervised: Ints32

    def __len__(self) -> int:
        return len(self.row)

    def take(self, which: Ints) -> SampleTable:
        """The samples with the numbers `which`, in that order."""
        return SampleTable(*(getattr(self, field.name)[which] for field in fields(self)))

    def has_images(self, stores: Sequence[RowStore]) -> npt.NDArray[np.bool_]:
        """Whether the row of each sample has images ``[S]``."""
        found = np.zeros(len(self), dtype=np.bool_)
        for number, store in enumerate(stores):
            of_store = self.source == number
            found[of_store] = store.has_images[self.row[of_store]]
        return found

    @classmethod
    def joined(cls, tables: list[SampleTable]) -> SampleTable:
        """Concatenate `tables`."""
        if len(tables) == 1:
            return tables[0]
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(t, name) for t in tables]) for name in names))

    def row_starts(self) -> Ints:
        """The start of the samples of each row, then S; ``[U + 1]``. They are contiguous."""
        new_row = (np.diff(self.row) != 0) | (np.diff(self.source) != 0)
        ends = [len(self)] if len(self) else []
        return np.concatenate([[0], np.flatnonzero(new_row) + 1, ends]).astype(np.int64)


def samples_of(rows: Ints, starts: Ints) -> Ints:
    """The sample numbers of `rows`, row by row; `starts` is from `SampleTable.row_starts`."""
    counts = starts[rows + 1] - starts[rows]
    firsts = np.repeat(starts[rows] - (np.cumsum(counts) - counts), counts)
    return firsts + np.arange(counts.sum(), dtype=np.int64)
