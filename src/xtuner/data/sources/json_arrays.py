"""Go through a JSON array of rows; of the file only a stretch of text is held at a time."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from xtuner.data.sources.rows import NOT_UTF8, Fault, as_row
from xtuner.errors import DataError
from xtuner.types import Row

STRETCH = 1 << 20
"""Bytes that are read at once."""

_LONGEST_LITERAL = 16
"""A parser that stops nearer to the end of the text may only lack the rest of a word or escape."""

_SPACE = re.compile(r"[ \t\r\n]*")


def array_rows(data: BinaryIO, *, name: str) -> Iterator[Row | Fault]:
    """Yield each row of the array that `data`, the file called `name`, holds.

    Raises:
        DataError: the text is not a whole array; its rest cannot be read then.
    """
    text = _SlidingText(data, name)
    text.skip("[")
    for number in itertools.count(1):
        if number == 1 and text.next() == "]":
            break
        yield as_row(*text.value())
        if text.next() != ",":
            break
        text.skip(",")
    if text.next() != "]":
        raise text.broken("expecting ',' and the next row, or ']'")
    text.skip("]")
    if text.next():
        raise text.broken("there is more after the ']' of the array")


def refuse_single_object(data: BinaryIO, *, name: str) -> None:
    """Raise if `data` is one JSON object, which is neither an array of rows nor an object a line.

    Raises:
        DataError: it is.
    """
    text = _SlidingText(data, name)
    try:
        text.value()
        more = text.next()
    except DataError:
        return  # broken lines are named one by one
    if not more:
        raise DataError(
            f"{name}: is one JSON object; wanted is an array of rows, [{{...}}, {{...}}], or one "
            "object a line"
        )


class _SlidingText:
    """The text of a file from a place on; what lies before it is forgotten when more is read.

    Args:
        data: the file, from its start.
        name: what messages call it.
    """

    def __init__(self, data: BinaryIO, name: str) -> None:
        self._data, self._name = data, name
        self._decoder = json.JSONDecoder()
        self._characters = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._lines = self._columns = 0  # lines before the text; characters of its line before it
        self._ended = False

    def next(self) -> str:
        """The first character that is not space, which is where the text is then; '' at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(STRETCH)

    def skip(self, character: str) -> None:
        """Go on behind `character`, which must be next."""
        found = self.next()
        assert found == character
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """The JSON value that is next, and its text.

        Raises:
            DataError: there is none.
        """
        self.next()
        for doubled in itertools.count():
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_cut(error):
                    raise self.broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise self.broken(str(error)) from error
            except ValueError as error:  # an integer of too many digits, if it does not go on
                if self._ended:
                    raise self.broken(str(error)) from error
            else:
                # a number at the end may have more digits
                if end < len(self._text) or self._ended:
                    text = self._text[self._at : end]
                    self._at = end
                    return value, text
            # a row is parsed anew from its start: twice as much each time keeps that cheap
            self._read(STRETCH << doubled)
        raise AssertionError("unreachable")

    def broken(self, problem: str, position: int | None = None) -> DataError:
        """What to raise for a fault at `position` of the text, or where it is."""
        text, position = self._text, self._at if position is None else position
        line_start = text.rfind("\n", 0, position)
        column = position - line_start if line_start >= 0 else position + self._columns + 1
        return DataError(
            f"{self._name} line {self._line(position)} column {column}: is not valid JSON: "
            f"{problem}. The rest of the array cannot be read; mend this place (with one object a "
            "line, only this row would be lost)"
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        near_end = error.pos > len(self._text) - _LONGEST_LITERAL
        return not self._ended and (near_end or error.msg.startswith("Unterminated string"))

    def _line(self, position: int) -> int:
        return self._lines + self._text.count("\n", 0, position) + 1

    def _read(self, size: int) -> None:
        """Forget the text before this place, and append that of `size` more bytes."""
        raw = self._data.read(size)
        self._ended = not raw
        try:
            more = self._characters.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            before = self._line(len(self._text))
            line = before + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._name} line {line}: {NOT_UTF8}") from error
        line_start = self._text.rfind("\n", 0, self._at)
        self._lines = self._line(self._at) - 1
        self._columns = self._at - line_start - 1 + (self._columns if line_start < 0 else 0)
        self._text = self._text[self._at :] + more
        self._at = 0
