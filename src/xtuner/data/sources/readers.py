"""Read the rows of a local file: json, jsonl, csv, tsv, parquet, arrow, txt; text files also as
.gz.

Rows are yielded as `RawRow`s. A row that cannot be read is yielded as a `Fault`; only errors that
make the rest of the file unreadable are raised. Lines of JSON are passed on as bytes, so that the
encoding processes share the work of parsing them.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from xtuner.data.sources.json_arrays import Layout, json_rows, layout_of
from xtuner.data.sources.parquet import parquet_rows
from xtuner.data.sources.rows import NOT_UTF8, Fault, RawRow, Unit
from xtuner.data.sources.tables import SEPARATORS, csv_rows, delimiter_of
from xtuner.errors import DataError
from xtuner.types import Row

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_TABLES = (".parquet", ".arrow")
_BOM = b"\xef\xbb\xbf"


class _Stream(NamedTuple):
    """An open file: `data` is decompressed, `position` returns the bytes read from disk."""

    data: BinaryIO
    position: Callable[[], int]


@dataclass(frozen=True)
class LocalFile:
    """A data file on disk; `name` is used in messages."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        """Size on disk in bytes."""
        return self.path.stat().st_size

    @cached_property
    def unit(self) -> Unit:
        """Whether rows are numbered by line or by row."""
        if self._kind in _TABLES:
            return "row"
        return "row" if self._kind in (".json", ".jsonl") and self._layout != "lines" else "line"

    @property
    def note(self) -> str:
        """A note for the user on how the file is read."""
        usual = {".csv": ",", ".tsv": "\t"}.get(self._kind)
        if usual is None or self.delimiter == usual:
            return ""
        return f"cells are separated by {SEPARATORS[self.delimiter]}"

    @cached_property
    def delimiter(self) -> str:
        """The separator of the cells of a table."""
        with self._read_errors(), self._open() as stream:
            return delimiter_of(stream.data, usual="\t" if self._kind == ".tsv" else ",")

    def digest(self) -> str:
        """A hash of the contents."""
        with self._read_errors(), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def rows(self) -> Iterator[RawRow]:
        """Iterate over the rows.

        Raises:
            DataError: The file, or the rest of it, cannot be read.
        """
        if self._kind in _TABLES:
            size = self.size
            for number, (row, share) in enumerate(parquet_rows(self.path, name=self.name), 1):
                yield RawRow(number, row, int(size * share))
            return
        with self._read_errors():
            with self._open() as stream:
                if stream.data.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{self.name}: is UTF-16 text; save the file as UTF-8")
            with self._open() as stream:
                yield from self._text_rows(stream)

    def _text_rows(self, stream: _Stream) -> Iterator[RawRow]:
        data = stream.data
        if self._kind == ".txt":
            if (raw := data.read()).removeprefix(_BOM).strip():
                yield RawRow(1, _document(raw), self.size)
        elif self._kind in (".csv", ".tsv"):
            for line, row in csv_rows(data, name=self.name, delimiter=self.delimiter):
                yield RawRow(line, row, stream.position())
        elif self.unit == "row":
            rows = json_rows(data, self._layout, name=self.name)
            for number, row in enumerate(rows, 1):
                yield RawRow(number, row, stream.position())
        else:
            yield from self._line_rows(stream)

    def _line_rows(self, stream: _Stream) -> Iterator[RawRow]:
        for line, raw in enumerate(stream.data, 1):
            text = raw.removeprefix(_BOM) if line == 1 else raw
            if text.strip():
                yield RawRow(line, text, stream.position())

    @property
    def _kind(self) -> str:
        return data_suffix(self.path)

    @cached_property
    def _layout(self) -> Layout:
        """The layout of the rows in a JSON file."""
        with self._read_errors(), self._open() as stream:
            return layout_of(stream.data, name=self.name)

    @contextlib.contextmanager
    def _open(self) -> Iterator[_Stream]:
        with self.path.open("rb") as file:
            if self.path.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=file) as decompressed:
                    yield _Stream(cast(BinaryIO, decompressed), file.tell)
            else:
                yield _Stream(file, file.tell)

    @contextlib.contextmanager
    def _read_errors(self) -> Iterator[None]:
        """Convert read errors to DataError."""
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.name}: is not a complete gzip file: {error}") from error
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error.strerror or error}") from error


def data_suffix(path: Path) -> str:
    """The suffix of a data file, in lower case and without ``.gz``."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return "" if suffix in _TABLES and name.endswith(".gz") else suffix


def _document(raw: bytes) -> Row | Fault:
    """Read a text file as one document."""
    if b"\0" in raw:
        return Fault("contains NUL bytes, so it is not a text file")
    try:
        return {"text": raw.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return Fault(NOT_UTF8, detail=f"byte {error.start + 1}")
