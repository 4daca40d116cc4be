"""The samples of rows that are several samples, as arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

PART = ("row", "length", "supervised", "images")
"""What is stored of each sample of a row that is several samples: the number of the row, tokens,
supervised tokens, and images."""


class Parts(NamedTuple):
    """The samples of the rows that are several samples, in order; all arrays are ``[P]``.

    Attributes:
        row: Number of the row.
        start, length: The range of tokens of the row.
        supervised: Number of supervised tokens.
        images: Number of images.
    """

    row: npt.NDArray[np.int32]
    start: npt.NDArray[np.int32]
    length: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    images: npt.NDArray[np.int32]

    @classmethod
    def of(cls, stored: npt.NDArray[np.int32]) -> Parts:
        """From the array that is stored."""
        row, length, supervised, images = stored.reshape(-1, len(PART)).T
        ends = np.cumsum(length)
        _, first, sizes = np.unique(row, return_index=True, return_counts=True)
        before = np.repeat((ends - length)[first], sizes)
        return cls(row, (ends - length - before).astype(np.int32), length, supervised, images)

    def of_row(self, row: int) -> slice:
        """Where the samples of `row` are."""
        return slice(*np.searchsorted(self.row, (row, row + 1)).tolist())
