"""Go through a JSON array of rows; the file is held as text, its rows are made one by one."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

from xtuner.data.rows import NOT_UTF8, Fault, as_row
from xtuner.errors import DataError
from xtuner.types import Row

_SPACE = re.compile(r"[ \t\r\n]*")


def array_rows(raw: bytes, *, name: str) -> Iterator[tuple[Row | Fault, float]]:
    """Yield each row of the array that the file `name` holds, and the share of the file read.

    Raises:
        DataError: the text is not a whole array; its rest cannot be read then.
    """
    text = _decoded(raw, name)
    decoder = json.JSONDecoder()
    position = _after_space(text, text.index("[") + 1)
    for number in itertools.count(1):
        if number == 1 and text.startswith("]", position):
            break
        start = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise _broken(name, text, error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise _broken(name, text, position, str(error)) from error
        yield as_row(value, text[start:position]), position / len(text)
        position = _after_space(text, position)
        if not text.startswith(",", position):
            break
        position = _after_space(text, position + 1)
    if not text.startswith("]", position):
        raise _broken(name, text, position, "expecting ',' and the next row, or ']'")
    rest = _after_space(text, position + 1)
    if rest < len(text):
        raise _broken(name, text, rest, "there is more after the ']' of the array")


def refuse_single_object(raw: bytes, *, name: str) -> None:
    """Raise if `raw` is one JSON object, which is neither an array of rows nor an object a line."""
    try:
        json.loads(raw)
    except (ValueError, RecursionError):
        return
    raise DataError(
        f"{name}: is one JSON object; wanted is an array of rows, [{{...}}, {{...}}], or one "
        "object a line"
    )


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} line {line}: {NOT_UTF8}") from error


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _broken(name: str, text: str, position: int, problem: str) -> DataError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return DataError(
        f"{name} line {line} column {column}: is not valid JSON: {problem}. The rest of the array "
        "cannot be read; mend this place (with one object a line, only this row would be lost)"
    )
