"""Tools that an assistant may call, and its calls, in the form that chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.data.formats.base import RowError, kind, objects, parse_json, text
from xtuner.types import Row


def read_tools(row: Row, column: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Read the schemas of the tools: a list, or JSON text that holds one; it may be empty."""
    return tuple(schema for _, schema in objects(_listed(row.get(column), column), within=column))


def read_calls(value: Any, *, where: str) -> tuple[Mapping[str, Any], ...]:
    """Read calls: a list or one object, or JSON text that holds one of these.

    Each call is brought into the form ``{"type": "function", "function": {"name", "arguments"}}``,
    with an object for the arguments, since templates print text in quotes.
    """
    if isinstance(value, str) and value.strip():
        value = parse_json(value, where=where)
    if isinstance(value, Mapping):
        value = [value]
    return tuple(_call(call, place) for place, call in objects(_listed(value, where), within=where))


def _listed(value: Any, where: str) -> Sequence[Any]:
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        value = parse_json(value, where=where)
    if not isinstance(value, list | tuple):
        raise RowError(where, f"is {kind(value)}", "it must be a list")
    return value


def _call(call: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    outer: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        outer["id"] = call["id"]
    if call.get("function") is not None:
        place += "function."
        call = call["function"]
        if not isinstance(call, Mapping):
            raise RowError(place.rstrip("."), f"is {kind(call)}", "it must be an object")
    arguments = call.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, where=f"{place}arguments")
    if arguments in (None, ""):
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise RowError(f"{place}arguments", f"is {kind(arguments)}", "it must be an object")
    return outer | {"function": {"name": text(call, "name", within=place), "arguments": arguments}}
