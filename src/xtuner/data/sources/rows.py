"""Rows as read, and faults of rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from xtuner.errors import message_of
from xtuner.types import Row

Unit = Literal["line", "row"]
"""What row numbers count: lines of text, or rows if rows are not lines."""

NOT_UTF8 = "is not UTF-8 text; save the file as UTF-8"


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used.

    Attributes:
        reason: The problem and how to fix it, worded the same for all rows with this fault.
        field: The faulty part of the row, such as ``messages[1].role``; empty for the row itself.
        detail: Details of this row.
        file: A referenced file that is faulty; when it is fixed, the row becomes usable.
    """

    reason: str
    field: str = ""
    detail: str = ""
    file: str = ""

    @property
    def words(self) -> str:
        """Field and reason."""
        return f"{self.field}: {self.reason}" if self.field else self.reason

    def __str__(self) -> str:
        return f"{self.words}{f' ({self.detail})' if self.detail else ''}"


class RawRow(NamedTuple):
    """One row as read.

    Attributes:
        line: Its line or number, from 1.
        value: An unparsed line of JSON, a row, or a fault.
        end: Bytes of the file on disk read so far.
    """

    line: int
    value: bytes | Row | Fault
    end: int

    def parsed(self) -> Row | Fault:
        """The row or fault, parsed if it is a line of JSON."""
        return parse(self.value) if isinstance(self.value, bytes) else self.value


def without_nulls(row: Row) -> Row:
    """`row` of a table without the null values of objects inside its columns, at every depth. All
    rows of a table share one schema, so an object has every key that any row has, with null for
    missing ones. The columns themselves are kept.
    """
    return {name: _stripped(value) for name, value in row.items()}


def _stripped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value


class Task(NamedTuple):
    """A row to encode: the number of its file in the source, and the row as read."""

    file: int
    row: RawRow


def parse(raw: bytes) -> Row | Fault:
    """Parse a line of JSON."""
    try:
        text = raw.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        return Fault(NOT_UTF8, detail=f"byte {error.start + 1} of the line")
    try:
        return as_row(json.loads(text), text)
    except json.JSONDecodeError as error:
        return Fault("is not valid JSON", detail=f"column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Fault("is not valid JSON", detail=message_of(error))


def as_row(value: Any, text: str) -> Row | Fault:
    """Check that `value`, parsed from the JSON `text`, is an object that UTF-8 can encode."""
    if not isinstance(value, dict):
        kind = _JSON_TYPES.get(type(value), "null")
        return Fault(f"must be a JSON object, {{...}}, but is {kind}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault("contains an unpaired surrogate, an escape from \\ud800 to \\udfff")
    if "NaN" in text:  # pandas writes an empty cell like this
        return {name: None if item != item else item for name, item in value.items()}
    return value


_JSON_TYPES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
}
