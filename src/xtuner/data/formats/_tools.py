"""Read tools and tool calls in the form that chat templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.data.formats.base import RowError, kind, objects, parse_json, text
from xtuner.types import Row


def read_tools(row: Row, column: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Read the schemas of the tools: a list, possibly as JSON text; may be empty."""
    return tuple(schema for _, schema in objects(_listed(row.get(column), column), within=column))


def read_calls(value: Any, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read calls: a list or a single object, possibly as JSON text.

    Each call is converted to ``{"type": "function", "function": {"name", "arguments"}}``. The
    arguments become an object, since templates would quote a string.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where=where)
    if isinstance(value, Mapping):
        value = [value]
    return tuple(_call(call, path) for path, call in objects(_listed(value, where), within=where))


def _listed(value: Any, where: str) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = parse_json(value, where=where)
    if not isinstance(value, list | tuple):
        raise RowError(where, f"is {kind(value)}", "it must be a list")
    return value


def _call(call: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    outer: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        outer["id"] = call["id"]
    if call.get("function") is not None:
        path += "function."
        call = call["function"]
        if not isinstance(call, Mapping):
            raise RowError(path.rstrip("."), f"is {kind(call)}", "it must be an object")
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, where=f"{path}arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{path}arguments", f"is {kind(arguments)}", "it must be an object")
    return outer | {"function": {"name": text(call, "name", within=path), "arguments": arguments}}
