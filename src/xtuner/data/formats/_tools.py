"""Read the tools and tool calls of a row; see `xtuner.calls`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xtuner.calls.read import CallFormatError, python_literal, read_call, read_tool
from xtuner.calls.scan import json_end, loads
from xtuner.data.formats.base import RowError, kind
from xtuner.types import Row


def read_tools(row: Row, column: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Read the schemas in a column: a list, possibly as JSON text; may be empty."""
    return _each(row.get(column), read_tool, column)


def read_calls(value: Any, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read calls: a list or a single object, possibly as JSON text.

    Arguments that are JSON text become an object, since templates would quote a string; arguments
    that are not JSON stay text, and are found when calls are checked.
    """
    return _each(value, read_call, where)


def _each(
    value: Any, read: Callable[[Any, str], dict[str, Any]], where: str
) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str) and value.strip():
        try:
            value = python_literal(value)
        except ValueError as error:
            raise RowError(where, "is not valid JSON", "write it as JSON") from error
    if value is None or value == "":
        return ()
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(where, f"is {kind(value)}", "it must be a list")
    try:
        return tuple(read(item, f"[{index}]") for index, item in enumerate(value))
    except CallFormatError as error:
        problem, _, hint = error.problem.partition("; ")
        raise RowError(f"{where}{error.path}", problem, hint) from error


def objects_in(text: str) -> list[Any]:
    """The JSON objects and lists in a text, in order; text between them is skipped."""
    found, at = [], 0
    while (at := _next_bracket(text, at)) >= 0:
        end = json_end(text, at)
        if end is None:
            break
        try:
            found.append(loads(text[at:end]))
            at = end
        except ValueError:
            at += 1
    return found


def _next_bracket(text: str, start: int) -> int:
    found = [at for bracket in "{[" if (at := text.find(bracket, start)) >= 0]
    return min(found, default=-1)


def tools_in(values: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools among `values` and in lists among them; other values are skipped."""
    tools: list[Mapping[str, Any]] = []
    for value in values:
        if isinstance(value, list):
            tools += tools_in(value)
            continue
        try:
            tools.append(read_tool(value))
        except CallFormatError:
            continue
    return tuple(tools)
