"""Read JSON rows that are not one per line, in bounded memory: an array, an array inside an object,
or objects over several lines."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from xtuner.data.sources.rows import NOT_UTF8, Fault, as_row
from xtuner.errors import DataError
from xtuner.types import Row

Layout = Literal["lines", "array", "wrapped", "objects"]

WRAPPERS = frozenset(
    "data rows train examples samples instances items records entries dataset results".split()
)
"""Keys, in lower case, under which files that are one object keep their rows."""

BLOCK = 1 << 20
"""Bytes per read."""

_MAX_LITERAL = 16
"""A parse error this close to the end of the text may be due to a truncated word or escape."""

_SPACE = re.compile(r"[ \t\r\n]*")


def layout_of(data: BinaryIO, *, name: str) -> Layout:
    """The layout of the rows in `data`, the JSON file `name`. At most the first object is held in
    memory; what cannot be parsed is treated as lines, whose faults are reported one by one.
    """
    start = data.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    while not start and (more := data.read(4096)):
        start = more.lstrip()
    if start.startswith(b"["):
        return "array"
    data.seek(0)
    text = _SlidingText(data, name)
    try:
        if text.next() != "{":
            return "lines"
        first = text.line
        wrappers = [text.is_wrapper(key) and _skip_array(text) for key in text.members()]
        several = text.line > first
        if any(wrappers) and not text.next():
            return "wrapped"
    except DataError:
        return "lines"
    return "objects" if several else "lines"


def json_rows(data: BinaryIO, layout: Layout, *, name: str) -> Iterator[Row | Fault]:
    """Yield each row of `data`, the file `name`, which is laid out as an array, wrapped, or as
    objects over several lines.

    Raises:
        DataError: The text is not complete JSON; the rest cannot be read then.
    """
    text = _SlidingText(data, name)
    if layout == "objects":
        while text.next():
            yield as_row(*text.value())
    elif layout == "wrapped":
        for key in text.members():
            if text.is_wrapper(key):
                yield from _array(text)
    else:
        yield from _array(text)
        if text.next():
            raise text.invalid("extra data after the ']' of the array")


def _array(text: _SlidingText) -> Iterator[Row | Fault]:
    text.skip("[")
    for number in itertools.count(1):
        if number == 1 and text.next() == "]":
            break
        yield as_row(*text.value())
        if text.next() != ",":
            break
        text.skip(",")
    if text.next() != "]":
        raise text.invalid("expecting ',' and the next row, or ']'")
    text.skip("]")


def _skip_array(text: _SlidingText) -> bool:
    """Consume an array of rows."""
    for _ in _array(text):
        pass
    return True


class _SlidingText:
    """A window on the text of a file; the text before the position is dropped as more is read.

    Args:
        data: The file, from its start.
        name: The file's name in messages.
    """

    def __init__(self, data: BinaryIO, name: str) -> None:
        self._data, self._name = data, name
        self._decoder = json.JSONDecoder()
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._lines = self._columns = 0  # lines before the window; characters of its first line
        self._dropped = 0  # characters before the window
        self._ended = False

    @property
    def line(self) -> int:
        """Line of the current position, from 1."""
        return self._line(self._at)

    def members(self) -> Iterator[str]:
        """Consume the next object, yielding each key; its value is skipped unless the caller
        consumes it.

        Raises:
            DataError: It is not a complete object.
        """
        self.skip("{")
        if self.next() != "}":
            while True:
                key, _ = self.value()
                if not isinstance(key, str) or self.next() != ":":
                    raise self.invalid("expecting a key and ':'")
                self.skip(":")
                self.next()
                unread = self._consumed()
                yield key
                if unread == self._consumed():
                    self.value()
                if self.next() != ",":
                    break
                self.skip(",")
        if self.next() != "}":
            raise self.invalid("expecting ',' and the next key, or '}'")
        self.skip("}")

    def is_wrapper(self, key: str) -> bool:
        """Whether the value of `key`, which is next, is a list of rows inside an object."""
        return key.lower() in WRAPPERS and self.next() == "["

    def next(self) -> str:
        """Skip white space and return the next character without consuming it; '' at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(BLOCK)

    def skip(self, character: str) -> None:
        """Consume `character`, which must be next."""
        found = self.next()
        assert found == character
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """Consume the next JSON value; return it and its text.

        Raises:
            DataError: There is none.
        """
        self.next()
        for doubled in itertools.count():
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_truncated(error):
                    raise self.invalid(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.invalid(str(error)) from error
            except ValueError as error:  # an integer with too many digits, unless truncated
                if self._ended:
                    raise self.invalid(str(error)) from error
            else:
                # a number at the end of the window may have more digits
                if end < len(self._text) or self._ended:
                    text = self._text[self._at : end]
                    self._at = end
                    return value, text
            # the row is parsed again from its start, so doubling the block keeps the cost linear
            self._read(BLOCK << doubled)
        raise AssertionError("unreachable")

    def invalid(self, problem: str, position: int | None = None) -> DataError:
        """The error for a problem at `position` of the window, by default the current one."""
        text, position = self._text, self._at if position is None else position
        line_start = text.rfind("\n", 0, position)
        column = position - line_start if line_start >= 0 else position + self._columns + 1
        return DataError(
            f"{self._name} line {self._line(position)} column {column}: is not valid JSON: "
            f"{problem}. The rest of the file cannot be read; fix this row (with one object per "
            "line, only this row would be lost)"
        )

    def _consumed(self) -> int:
        """Number of characters before the position."""
        return self._dropped + self._at

    def _may_be_truncated(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos > len(self._text) - _MAX_LITERAL
        return not self._ended and (near_end or error.msg.startswith("Unterminated string"))

    def _line(self, position: int) -> int:
        return self._lines + self._text.count("\n", 0, position) + 1

    def _read(self, size: int) -> None:
        """Drop the text before the position, and append `size` more bytes."""
        raw = self._data.read(size)
        self._ended = not raw
        try:
            more = self._characters.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line(len(self._text)) + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._name} line {line}: {NOT_UTF8}") from error
        line_start = self._text.rfind("\n", 0, self._at)
        self._lines = self._line(self._at) - 1
        self._columns = self._at - line_start - 1 + (self._columns if line_start < 0 else 0)
        self._dropped += self._at
        self._text = self._text[self._at :] + more
        self._at = 0
