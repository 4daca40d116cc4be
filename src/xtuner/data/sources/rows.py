"""A row as it was read, or why it could not be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from xtuner.types import Row

Unit = Literal["line", "row"]
"""What the numbers of rows count: lines of text, or rows where a row has no line of its own."""

NOT_UTF8 = "is not UTF-8 text; save the file in UTF-8"


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be used.

    Attributes:
        reason: what is wrong and how to hint it, in the same words for all rows with this fault.
        field: the part of the row at fault, such as ``messages[1].role``; empty for the whole row.
        detail: what concerns this row only.
        file: a file beside the data that is at fault; once it is mended the row is sound.
    """

    reason: str
    field: str = ""
    detail: str = ""
    file: str = ""

    @property
    def words(self) -> str:
        """The field and the reason."""
        return f"{self.field}: {self.reason}" if self.field else self.reason

    def __str__(self) -> str:
        return f"{self.words}{f' ({self.detail})' if self.detail else ''}"


class RawRow(NamedTuple):
    """One row as read.

    Attributes:
        line: its line or number, from 1.
        value: a line of JSON that is yet to be parsed, a row, or why there is none.
        end: bytes of the file on disk read so far.
    """

    line: int
    value: bytes | Row | Fault
    end: int


def parse(raw: bytes) -> Row | Fault:
    """Read one line of JSON."""
    try:
        text = raw.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        return Fault(NOT_UTF8, detail=f"byte {error.start + 1} of the line")
    try:
        return as_row(json.loads(text), text)
    except json.JSONDecodeError as error:
        return Fault("is not valid JSON", detail=f"column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return Fault("is not valid JSON", detail=" ".join(str(error).split()))


def as_row(value: Any, text: str) -> Row | Fault:
    """Check that a value parsed from the JSON `text` is an object that UTF-8 can hold."""
    if not isinstance(value, dict):
        kind = _JSON_TYPES.get(type(value), "null")
        return Fault(f"must be a JSON object, {{...}}, but is {kind}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Fault("holds half a character: an escape \\ud800 to \\udfff without its partner")
    return value


_JSON_TYPES = {
    list: "an array",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
}
