"""Read the rows of a table: csv or tsv."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from xtuner.data.sources.rows import NOT_UTF8, Fault
from xtuner.errors import DataError
from xtuner.types import Row

_MAX_CELL = 2**31 - 1
_MAX_HEADER = 65_536
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""Possible separators of the cells of a table."""


def delimiter_of(data: BinaryIO, *, usual: str) -> str:
    """The separator of a table: `usual`, unless it gives one cell in the header and another
    separator gives more."""
    lines = data.read(_MAX_HEADER).decode("utf-8-sig", "replace").splitlines()
    header = next((line for line in lines if line.strip()), "")

    def cells(delimiter: str) -> int:
        try:
            return len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            return 1

    if cells(usual) != 1:
        return usual
    return max((usual, *SEPARATORS), key=cells)


def csv_rows(data: BinaryIO, *, name: str, delimiter: str) -> Iterator[tuple[int, Row | Fault]]:
    """Yield the first line of each row, and the row. The first line of the file is the header.

    Raises:
        DataError: The header is invalid.
    """
    csv.field_size_limit(_MAX_CELL)
    # undecodable bytes become surrogates, so that a bad cell affects only its row
    with io.TextIOWrapper(data, "utf-8-sig", "surrogateescape", newline="") as text:
        table = csv.reader(text, delimiter=delimiter, strict=True)
        header = _header(table, name)
        while header:
            line = table.line_num + 1
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, _fault(error)
                continue
            if cells:
                yield line, _row(header, cells)


def _header(table: Any, name: str) -> list[str]:
    try:
        header: list[str] = next((cells for cells in table if cells), [])
    except csv.Error as error:
        raise DataError(f"{name} line 1: is not valid CSV: {error}") from error
    raw = ",".join(header).encode("utf-8", "surrogateescape")
    if not _is(raw, "utf-8"):
        raise DataError(f"{name} line 1: {NOT_UTF8}{_other_encoding(raw, name)}")
    duplicates = sorted({column for column in header if header.count(column) > 1})
    if duplicates:
        raise DataError(f"{name} line 1: duplicate columns in the header: {', '.join(duplicates)}")
    return header


def _other_encoding(raw: bytes, name: str) -> str:
    """How to save the table `name`, whose header `raw` is not UTF-8."""
    save = " (in a spreadsheet: 'CSV UTF-8')"
    if not _is(raw, "gb18030"):
        return save
    new = Path(name).with_stem(f"{Path(name).stem}_utf8")
    return (
        f"{save}. In GBK, the columns are {raw.decode('gb18030')!r:.80}; to convert it:\n"
        f"  iconv -f GB18030 -t UTF-8 {shlex.quote(name)} > {shlex.quote(str(new))}"
    )


def _is(raw: bytes, encoding: str) -> bool:
    """Whether `raw` is text in `encoding`."""
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _fault(error: csv.Error) -> Fault:
    if "unexpected end" in str(error):
        return Fault("opens a quote that is never closed, so all following lines are lost")
    return Fault("is not valid CSV", detail=str(error))


def _row(header: list[str], cells: list[str]) -> Row | Fault:
    if len(cells) != len(header):
        reason = f"must have as many cells as the header, {len(header)}"
        return Fault(reason, detail=f"it has {len(cells)}")
    text = "".join(cells)
    if "\0" in text:
        return Fault("contains NUL bytes; remove them")
    try:
        text.encode()
    except UnicodeEncodeError:
        return Fault(f"{NOT_UTF8} (in a spreadsheet: 'CSV UTF-8')")
    return dict(zip(header, cells, strict=True))
