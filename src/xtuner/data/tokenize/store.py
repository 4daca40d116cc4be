"""Encoded rows on disk: .npy arrays that are read where needed, and a JSON of the rows that failed.

token_ids.npy int32 [T]   mask.npy bool [T]         all rows, end to end
offsets.npy int64 [R+1]                          where each row begins, then T
sequence_lengths.npy int32 [R*k]                 for rows of k > 1 sequences; else empty
lines.npy int32 [R]    files.npy int32 [R]       the row's line in its file, the file's number
supervised.npy int32 [R]  hashes.npy uint64 [R]  tokens in the loss, hash of the tokens
image_names.npy uint8 [B]  image_ends.npy int64 [R]  images (name, tokens) as JSON; each row's end
about.json                                       counts, and the rows that failed, by reason
bad_files.jsonl                                  names of files beside the data that are at fault
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtuner.data.sources.rows import Fault
from xtuner.data.tokenize.columns import Column, ColumnWriter
from xtuner.types import ImageRef, RowRef

ABOUT = "about.json"
BAD_FILES = "bad_files.jsonl"
_MOST_REASONS = 100
KEPT_FAULTS = 20
"""How many rows of each reason are kept with their line; all are counted."""

_ARRAYS: dict[str, Any] = {
    "token_ids": np.dtype("<i4"),
    "mask": np.dtype("?"),
    "offsets": np.dtype("<i8"),
    "sequence_lengths": np.dtype("<i4"),
    "lines": np.dtype("<i4"),
    "files": np.dtype("<i4"),
    "supervised": np.dtype("<i4"),
    "hashes": np.dtype("<u8"),
    "image_names": np.dtype("<u1"),
    "image_ends": np.dtype("<i8"),
}


@dataclass(frozen=True)
class BadRow:
    """A row that failed: the number of its file, its line, and why."""

    file: int
    line: int
    fault: Fault


@dataclass
class FaultGroup:
    """All rows that failed for one reason: in words that hold for all, and the first of them."""

    what: str
    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count `row`; its fault differs from the others in quoted words and list numbers only."""
        self.count += 1
        if len(self.first) < KEPT_FAULTS:
            self.first.append(row)
        if _outline(self.what) == _outline(row.fault.words):
            parts = zip(*map(_OF_A_ROW.split, (self.what, row.fault.words)), strict=True)
            self.what = "".join(a if a == b else _blank(a) for a, b in parts)


_OF_A_ROW = re.compile(r"('[^']*'|\[\d*\])")


def _outline(words: str) -> str:
    """What the words of rows with the same fault have in common."""
    return _OF_A_ROW.sub("?", words)


def _blank(part: str) -> str:
    return "[]" if part.startswith("[") else "'...'"


@dataclass
class EncodedChunk:
    """What some rows became: arrays as on disk, lengths for offsets, and the rows that failed."""

    token_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]
    sequence_lengths: npt.NDArray[np.int32]
    lines: npt.NDArray[np.int32]
    files: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    hashes: npt.NDArray[np.uint64]
    image_names: npt.NDArray[np.uint8]
    image_lengths: npt.NDArray[np.int64]
    faults: list[BadRow]


def packed_images(images: Sequence[ImageRef]) -> npt.NDArray[np.uint8]:
    """The images of a row as bytes; none for no images."""
    text = json.dumps(images, ensure_ascii=False) if images else ""
    return np.frombuffer(text.encode(), dtype=np.uint8)


class StoreWriter:
    """Write the arrays of a `RowStore`, chunk by chunk, in bounded memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._columns = {
            name: ColumnWriter(folder / f"{name}.npy", dtype) for name, dtype in _ARRAYS.items()
        }
        self._columns["offsets"].append(np.zeros(1))
        self._end = self._names_end = 0
        self._rows_read = 0
        self._faults: dict[str, FaultGroup] = {}
        self._bad_files = (folder / BAD_FILES).open("w", encoding="utf-8")

    def append(self, chunk: EncodedChunk) -> None:
        """Add the rows of `chunk`."""
        made = {
            "offsets": self._end + np.cumsum(chunk.lengths),
            "image_ends": self._names_end + np.cumsum(chunk.image_lengths),
        }
        for name, column in self._columns.items():
            column.append(made[name] if name in made else getattr(chunk, name))
        self._end += len(chunk.token_ids)
        self._names_end += len(chunk.image_names)
        self._rows_read += len(chunk.lengths) + len(chunk.faults)
        for row in chunk.faults:
            if row.fault.file:
                self._bad_files.write(json.dumps(row.fault.file) + "\n")
            key = _outline(row.fault.words)
            if key not in self._faults and len(self._faults) >= _MOST_REASONS:
                key = "has a fault of yet another kind"
                self._faults.setdefault(key, FaultGroup(key))
            self._faults.setdefault(key, FaultGroup(row.fault.words)).add(row)

    def finish(self) -> None:
        """Complete the arrays and write about.json, which makes the store valid."""
        self._bad_files.close()
        sizes = {name: column.close() for name, column in self._columns.items()}
        faults = sorted(self._faults.values(), key=lambda group: -group.count)
        about = {
            "sizes": sizes,
            "rows_read": self._rows_read,
            "faults": [asdict(group) for group in faults],
        }
        (self._folder / ABOUT).write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")

    def abort(self) -> None:
        """Close the files of a store that is given up."""
        self._bad_files.close()
        for column in self._columns.values():
            column.close()


class RowStore:
    """The encoded rows of one source, read from `folder` when they are asked for.

    Args:
        folder: a folder that `StoreWriter` finished.
        key: what the store is known by in the cache.
        file_names: the names of the source's files, for messages.
        units: what the numbers of their rows count; lines if it is left out.

    Raises:
        ValueError: the folder is incomplete or damaged.
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

    def _check(self) -> None:
        sizes = {name: len(column) for name, column in self._columns.items()}
        rows = sizes["lines"]
        offsets = self._columns["offsets"].read()
        consistent = (
            sizes == self.about.get("sizes")
            and sizes["offsets"] == rows + 1
            and sizes["token_ids"] == sizes["mask"] == offsets[-1]
            and (sizes["sequence_lengths"] % rows == 0 if rows else True)
            and {sizes[name] for name in ("files", "supervised", "hashes", "image_ends")} == {rows}
            and sizes["image_names"] == (self._value("image_ends", rows - 1) if rows else 0)
            and bool(np.all(offsets[1:] > offsets[:-1]))
        )
        if not consistent:
            raise ValueError(f"{self.folder}: the arrays do not fit together")

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
        """Sequences that each row holds, end to end."""
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

    def sequences_of(self, row: int) -> tuple[int, ...]:
        """Tokens of each sequence of one row."""
        k = self.sequences_per_row
        if k == 1:
            return (self.length(row),)
        return tuple(self._columns["sequence_lengths"].read(row * k, k).tolist())

    @property
    def supervised(self) -> npt.NDArray[np.int32]:
        """Tokens of each row that the loss sums over ``[R]``."""
        return self._columns["supervised"].read()

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's tokens and images ``[R]``."""
        return self._columns["hashes"].read()

    @property
    def rows_read(self) -> int:
        """Rows of the source, those that failed among them."""
        return int(self.about["rows_read"])

    @property
    def faults(self) -> list[FaultGroup]:
        """The rows that failed, by reason, the most frequent first."""
        return [
            FaultGroup(
                group["what"],
                group["count"],
                [BadRow(r["file"], r["line"], Fault(**r["fault"])) for r in group["first"]],
            )
            for group in self.about["faults"]
        ]

    def bad_files(self) -> Iterator[str]:
        """Names of the files beside the data by whose fault rows failed: all of them, in order."""
        with (self.folder / BAD_FILES).open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def tokens(
        self, row: int, start: int, length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """`length` token ids from `start` on of one row, and their loss mask."""
        first = self._value("offsets", row) + start
        return (
            self._columns["token_ids"].read(first, length).astype(np.int64),
            self._columns["mask"].read(first, length).copy(),
        )

    def length(self, row: int) -> int:
        """Tokens of one row."""
        start, end = self._columns["offsets"].read(row, 2).tolist()
        return int(end - start)

    def count_supervised(self, row: int, start: int, length: int) -> int:
        """How many of `length` tokens from `start` on the loss has; the first never counts."""
        first = self._value("offsets", row) + start
        return int(np.count_nonzero(self._columns["mask"].read(first + 1, length - 1)))

    def images(self, row: int) -> tuple[ImageRef, ...]:
        """The images of one row."""
        if not len(self._columns["image_names"]):
            return ()
        start = self._value("image_ends", row - 1) if row else 0
        packed = self._columns["image_names"].read(start, self._value("image_ends", row) - start)
        pairs = json.loads(packed.tobytes()) if len(packed) else ()
        return tuple(ImageRef(*pair) for pair in pairs)

    @property
    def has_images(self) -> npt.NDArray[np.bool_]:
        """Whether each row has images ``[R]``."""
        if not len(self._columns["image_names"]):
            return np.zeros(len(self), dtype=np.bool_)
        return np.diff(self._columns["image_ends"].read(), prepend=0) > 0

    def place(self, row: int) -> tuple[int, int]:
        """The number of the file that a row is from, and its line there."""
        return self._value("files", row), self._value("lines", row)

    def ref(self, row: int) -> RowRef:
        """Where a row came from."""
        file, line = self.place(row)
        return RowRef(self._file_names[file], line, self._units[file])
