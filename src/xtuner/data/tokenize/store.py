"""Encoded rows on disk: .npy arrays that are read on access, and the failed rows as JSON.

token_ids.npy int32 [T]   mask.npy bool [T]          all rows, concatenated
offsets.npy int64 [R+1]                              start of each row, then T
sequence_lengths.npy int32 [R*k]                     for rows of k > 1 sequences; else empty
weights.npy float32 [W]  weighted_rows.npy int32 [V]  loss weights of the tokens of the V rows that
                                                     have any; empty if all weights are 1
parts.npy int32 [4*P]                                rows that are several samples; see PART
lines.npy int32 [R]    files.npy int32 [R]           line of the row, number of its file
supervised.npy int32 [R]  hashes.npy uint64 [R]      supervised tokens, hash of the row
image_names.npy uint8 [B]  image_ends.npy int64 [R]  images (name, tokens) as JSON, end of each row
about.json                                           counts, and failed and kept rows by reason
bad_files.jsonl                                      names of faulty referenced files
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.data.tokenize.columns import Column, ColumnWriter
from xtuner.data.tokenize.faults import BadRow, FaultGroup, add_to_group, by_count
from xtuner.data.tokenize.parts import PART, Parts
from xtuner.types import ImageRef, RowRef

ABOUT = "about.json"
BAD_FILES = "bad_files.jsonl"

_ARRAYS: dict[str, Any] = {
    "token_ids": np.dtype("<i4"),
    "mask": np.dtype("?"),
    "offsets": np.dtype("<i8"),
    "sequence_lengths": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
    "weighted_rows": np.dtype("<i4"),
    "parts": np.dtype("<i4"),
    "lines": np.dtype("<i4"),
    "files": np.dtype("<i4"),
    "supervised": np.dtype("<i4"),
    "hashes": np.dtype("<u8"),
    "image_names": np.dtype("<u1"),
    "image_ends": np.dtype("<i8"),
}


@dataclass
class EncodedChunk:
    """Some encoded rows: arrays as on disk, lengths instead of offsets, parts ``[P, 4]``, and the
    rows that failed, or were kept with wrong tool calls. `weighted_rows` counts from the first row
    of the chunk."""

    token_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]
    sequence_lengths: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    weighted_rows: npt.NDArray[np.int32]
    parts: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    files: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    image_names: npt.NDArray[np.uint8]
    image_lengths: npt.NDArray[np.int64]
    faults: list[BadRow]
    kept: list[BadRow]


def packed_images(images: Sequence[ImageRef]) -> npt.NDArray[np.uint8]:
    """The images of a row as JSON bytes; empty if there are none."""
    text = json.dumps(images, ensure_ascii=False) if images else ""
    return np.frombuffer(text.encode(), dtype=np.uint8)


class StoreWriter:
    """Writes the arrays of a `RowStore` chunk by chunk, in bounded memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns = {
            name: ColumnWriter(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()
        }
        self._columns["offsets"].append(np.zeros(1))
        self._end = self._names_end = self._rows = 0
        self._rows_read = 0
        self._faults: dict[str, FaultGroup] = {}
        self._kept: dict[str, FaultGroup] = {}
        self._bad_files = (folder / BAD_FILES).open("w", encoding="utf-8")

    def append(self, chunk: EncodedChunk) -> None:
        """Append the rows of `chunk`."""
        parts = chunk.parts + np.array([self._rows, 0, 0, 0], np.int32)
        computed: dict[str, npt.NDArray[Any]] = {
            "parts": parts.reshape(-1),
            "offsets": self._end + np.cumsum(chunk.lengths),
            "image_ends": self._names_end + np.cumsum(chunk.image_lengths),
            "weighted_rows": self._rows + chunk.weighted_rows,
        }
        for name, column in self._columns.items():
            column.append(computed[name] if name in computed else getattr(chunk, name))
        self._end += len(chunk.token_ids)
        self._names_end += len(chunk.image_names)
        self._rows += len(chunk.lengths)
        self._rows_read += len(chunk.lengths) + len(chunk.faults)
        for row in chunk.faults:
            if row.fault.file:
                self._bad_files.write(json.dumps(row.fault.file) + "\n")
            add_to_group(self._faults, row)
        for row in chunk.kept:
            add_to_group(self._kept, row)

    def finish(self) -> None:
        """Complete the arrays and write about.json; the store is valid afterwards."""
        self._bad_files.close()
        sizes = {name: column.close() for name, column in self._columns.items()}
        about = {
            "sizes": sizes,
            "rows_read": self._rows_read,
            "faults": by_count(self._faults),
            "kept": by_count(self._kept),
        }
        (self._folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    def abort(self) -> None:
        """Close the files of an incomplete store."""
        self._bad_files.close()
        for column in self._columns.values():
            column.close()


class RowStore:
    """The encoded rows of one source, read from `folder` on access.

    Args:
        folder: A folder that `StoreWriter` finished.
        key: The key of the store in the cache.
        file_names: The names of the source's files, for messages.
        units: What the row numbers of each file count; default 'line'.

    Raises:
        ValueError: The folder is incomplete or damaged.
    """

    def __init__(
        self, folder: Path, *, key: str, file_names: Sequence[str], units: Sequence[str] = ()
    ) -> None:
        self.folder = folder
        self.key = key
        self._file_names = tuple(file_names)
        self._units = tuple(units) or ("line",) * len(self._file_names)
        self._open()
        self._check()

    def _open(self) -> None:
        try:
            self.about: dict[str, Any] = json.loads(
                (self.folder / ABOUT).read_text(encoding="utf-8")
            )
        except OSError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        self._columns = {
            name: Column(self.folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()
        }
        self._weighted_rows = self._columns["weighted_rows"].read()
        if self._weighted_rows.max(initial=-1) >= len(self):
            raise ValueError(f"{self.folder}: the arrays are inconsistent")
        lengths = self.lengths[self._weighted_rows] if len(self._weighted_rows) else ()
        self._weight_starts = np.cumsum([0, *lengths], dtype=np.int64)

    def _check(self) -> None:
        sizes = {name: len(column) for name, column in self._columns.items()}
        rows = sizes["lines"]
        offsets = self._columns["offsets"].read()
        consistent = (
            sizes == self.about.get("sizes")
            and sizes["offsets"] == rows + 1
            and sizes["token_ids"] == sizes["mask"] == offsets[-1]
            and (sizes["sequence_lengths"] % rows == 0 if rows else True)
            and self._are_parts_complete()
            and {sizes[name] for name in ("files", "supervised", "hashes", "image_ends")} == {rows}
            and sizes["image_names"] == (self._value("image_ends", rows - 1) if rows else 0)
            and bool(np.all(offsets[1:] > offsets[:-1]))
            and sizes["weights"] == self._weight_starts[-1]
        )
        if not consistent:
            raise ValueError(f"{self.folder}: the arrays are inconsistent")

    def _are_parts_complete(self) -> bool:
        """Whether the samples of each row of several are all of its tokens."""
        if len(self._columns["parts"]) % len(PART):
            return False
        rows, first = np.unique(self.parts.row, return_index=True)
        if not len(rows):
            return True
        totals = np.add.reduceat(self.parts.length, first)
        return bool(rows[0] >= 0 and rows[-1] < len(self) and (totals == self.lengths[rows]).all())

    def _value(self, name: str, row: int) -> int:
        return int(self._columns[name].read(row, 1)[0])

    def __getstate__(self) -> tuple[Path, str, tuple[str, ...], tuple[str, ...]]:
        return self.folder, self.key, self._file_names, self._units

    def __setstate__(self, state: tuple[Path, str, tuple[str, ...], tuple[str, ...]]) -> None:
        self.folder, self.key, self._file_names, self._units = state
        self._open()

    def __len__(self) -> int:
        return len(self._columns["lines"])

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each row ``[R]``."""
        return np.diff(self._columns["offsets"].read()).astype(np.int32)

    @property
    def sequences_per_row(self) -> int:
        """Number of concatenated sequences in each row."""
        return max(1, len(self._columns["sequence_lengths"]) // max(1, len(self)))

    @property
    def sequence_lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence of each row ``[R, k]``."""
        k = self.sequences_per_row
        return (
            self.lengths[:, None]
            if k == 1
            else self._columns["sequence_lengths"].read().reshape(-1, k)
        )

    @cached_property
    def parts(self) -> Parts:
        """The samples of the rows that are several samples."""
        return Parts.of(self._columns["parts"].read())

    @property
    def longest(self) -> npt.NDArray[np.int32]:
        """Tokens of the longest sequence of each row ``[R]``."""
        longest: npt.NDArray[np.int32] = self.sequence_lengths.max(axis=1, initial=0)
        if len(self.parts.row):
            longest[self.parts.row] = 0
            np.maximum.at(longest, self.parts.row, self.parts.length)
        return longest

    def sequences_of(self, row: int) -> tuple[int, ...]:
        """Tokens of each sequence of one row."""
        parts = self.parts.length[self.parts.of_row(row)]
        if len(parts):
            return tuple(parts.tolist())
        k = self.sequences_per_row
        if k == 1:
            return (self.length(row),)
        return tuple(self._columns["sequence_lengths"].read(row * k, k).tolist())

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """Supervised tokens of each row ``[R]``."""
        return self._columns["supervised"].read()

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's tokens and images ``[R]``."""
        return self._columns["hashes"].read()

    @property
    def rows_read(self) -> int:
        """Number of rows of the source, including failed ones."""
        return int(self.about["rows_read"])

    @property
    def faults(self) -> list[FaultGroup]:
        """The failed rows by reason, most frequent first."""
        return self._groups("faults")

    @property
    def kept(self) -> list[FaultGroup]:
        """The rows that are used although their tool calls are wrong, by reason."""
        return self._groups("kept")

    def _groups(self, name: str) -> list[FaultGroup]:
        return [FaultGroup.from_dict(group) for group in self.about[name]]

    def bad_files(self) -> Iterator[str]:
        """Names of the referenced files that made rows fail, in order."""
        with (self.folder / BAD_FILES).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def tokens(
        self, row: int, start: int, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """`length` token ids of a row from `start`, and their loss mask."""
        first = self._value("offsets", row) + start
        return (
            self._columns["token_ids"].read(first, length).astype(np.int64),
            self._columns["mask"].read(first, length).copy(),
        )

    @property
    def num_weighted(self) -> int:
        """Number of rows with loss weights other than 1."""
        return len(self._weighted_rows)

    def weights(self, row: int) -> npt.NDArray[np.float32] | None:
        """The loss weight of each token of a row ``[T]``; None if all are 1."""
        at = int(np.searchsorted(self._weighted_rows, row))
        if at == len(self._weighted_rows) or self._weighted_rows[at] != row:
            return None
        start, end = self._weight_starts[at : at + 2].tolist()
        return self._columns["weights"].read(start, end - start).copy()

    def length(self, row: int) -> int:
        """Tokens of one row."""
        start, end = self._columns["offsets"].read(row, 2).tolist()
        return int(end - start)

    def count_supervised(self, row: int, start: int, length: int) -> int:
        """Number of supervised tokens among `length` from `start`; the first never counts."""
        first = self._value("offsets", row) + start
        return int(np.count_nonzero(self._columns["mask"].read(first + 1, length - 1)))

    def images(self, row: int, start: int = 0) -> tuple[ImageRef, ...]:
        """The images of one row, or of its sample that begins at the token `start`."""
        if not len(self._columns["image_names"]):
            return ()
        first = self._value("image_ends", row - 1) if row else 0
        packed = self._columns["image_names"].read(first, self._value("image_ends", row) - first)
        pairs = json.loads(packed.tobytes()) if len(packed) else ()
        images = tuple(ImageRef(*pair) for pair in pairs)
        where = self.parts.of_row(row)
        if where.start == where.stop:
            return images
        ends = np.cumsum(self.parts.images[where])
        index = int(np.flatnonzero(self.parts.start[where] == start)[0])
        return images[int(ends[index - 1]) if index else 0 : int(ends[index])]

    @property
    def has_images(self) -> npt.NDArray[np.bool_]:
        """Whether each row has images ``[R]``."""
        if not len(self._columns["image_names"]):
            return np.zeros(len(self), dtype=np.bool_)
        return np.diff(self._columns["image_ends"].read(), prepend=0) > 0

    def location(self, row: int) -> tuple[int, int]:
        """The number of the row's file, and its line."""
        return self._value("files", row), self._value("lines", row)

    def ref(self, row: int) -> RowRef:
        """The origin of a row."""
        file, line = self.location(row)
        return RowRef(self._file_names[file], line, self._units[file])
