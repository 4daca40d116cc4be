"""Find the end of a JSON value in a text that is still growing."""

from __future__ import annotations

import json
from typing import Any

_SPACE = " \t\r\n"
_SCALAR_ENDS = ",]} \t\r\n<;|"


def skip_space(text: str, at: int) -> int:
    """Index of the first character from `at` on that is not white space."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def json_end(text: str, start: int) -> int | None:
    """Index after the JSON value that begins at `start`; None if it is not complete yet.

    Only strings and brackets are tracked, so an invalid value ends where its brackets are balanced.
    """
    if start >= len(text):
        return None
    if text[start] == '"':
        return _string_end(text, start)
    if text[start] not in "{[":
        ends = [at for end in _SCALAR_ENDS if (at := text.find(end, start)) >= 0]
        return min(ends) if ends else None
    depth, at = 0, start
    while at < len(text):
        character = text[at]
        if character == '"':
            end = _string_end(text, at)
            if end is None:
                return None
            at = end
            continue
        depth += (character in "{[") - (character in "}]")
        at += 1
        if depth == 0:
            return at
    return None


def _string_end(text: str, start: int) -> int | None:
    at = start + 1
    while at < len(text):
        if text[at] == "\\":
            at += 2
        elif text[at] == '"':
            return at + 1
        else:
            at += 1
    return None


def loads(text: str) -> Any:
    """Parse JSON; ValueError for anything else, including deep nesting and NaN."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
