"""Convert the tools and calls of data sets and chat APIs to one representation."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.calls.scan import loads
from xtuner.calls.schema import type_name

Call = Mapping[str, Any]


class CallFormatError(ValueError):
    """A value that is neither a tool nor a call.

    Attributes:
        path: Where it is, such as ``[1].function``; empty for the value itself.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.path, self.problem = path, problem

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


def make_call(name: str, arguments: Any, *, call_id: str | None = None) -> dict[str, Any]:
    """A call. Arguments that are JSON text become an object; other text is kept as it is."""
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments)
    if arguments is None or arguments == "":
        arguments = {}
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **call} if call_id is not None else call


def name_of(call: Call) -> str:
    """The name of the called function."""
    return str(call["function"]["name"])


def arguments_of(call: Call) -> Any:
    """The arguments of a call: an object, or whatever the data have instead."""
    return call["function"]["arguments"]


def read_call(value: Any, path: str = "") -> dict[str, Any]:
    """Convert a call from any of the usual formats.

    The name is `name`, `tool_name` or `api_name`; the arguments are `arguments`, `parameters`,
    `args` or `input`, as an object or as JSON text; both may be within `function`.

    Raises:
        CallFormatError: It is not a call.
    """
    if not isinstance(value, Mapping):
        raise CallFormatError(path, f"is {_kind(value)}; a call is an object")
    call_id = value.get("id") or value.get("tool_call_id")
    inner = value
    if isinstance(value.get("function"), Mapping):
        inner, path = value["function"], f"{path}.function" if path else "function"
    keys = ("name", "tool_name", "api_name") if inner is not value else (
        "name", "tool_name", "api_name", "function"
    )  # fmt: skip
    name = next((inner[key] for key in keys if inner.get(key)), None)
    if not isinstance(name, str) or not name.strip():
        where = f"{path}.name" if path else "name"
        raise CallFormatError(where, "is missing; a call names its tool")
    given = next((k for k in ("arguments", "parameters", "args", "input") if k in inner), None)
    arguments = inner[given] if given else None
    return make_call(name, arguments, call_id=None if call_id is None else str(call_id))


def read_tool(value: Any, path: str = "") -> dict[str, Any]:
    """Convert a tool: OpenAI's form, the inner object alone, or a list of parameters instead of a
    schema.

    Raises:
        CallFormatError: It is not a tool.
    """
    if not isinstance(value, Mapping):
        raise CallFormatError(path, f"is {_kind(value)}; a tool is an object")
    inner = value
    if isinstance(value.get("function"), Mapping):
        inner, path = value["function"], f"{path}.function" if path else "function"
    name = inner.get("name")
    if not isinstance(name, str) or not name.strip():
        where = f"{path}.name" if path else "name"
        raise CallFormatError(where, "is missing; a tool has a name")
    function: dict[str, Any] = {"name": name}
    if isinstance(inner.get("description"), str):
        function["description"] = inner["description"]
    given = next((k for k in ("parameters", "input_schema", "inputSchema") if k in inner), None)
    function["parameters"] = read_parameters(inner[given] if given else None, inner)
    used = {"name", "description", given, "required"}
    extra = {key: item for key, item in inner.items() if key not in used and item is not None}
    return {"type": "function", "function": {**function, **extra}}


def read_parameters(given: Any, tool: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of parameters, which are given as a schema, a list, or a dictionary by name.

    Args:
        given: The parameters as written.
        tool: The tool; its `required` is used if the parameters are a list.
    """
    if isinstance(given, str) and given.strip():
        given = _parsed(given)
    given = _without_nulls(given)
    if isinstance(given, Mapping) and (given.get("type") == "object" or "properties" in given):
        return {"type": "object", "properties": {}, **given}
    if isinstance(given, Mapping):
        entries = [(str(n), p) for n, p in given.items() if isinstance(p, Mapping)]
    else:
        listed = given if isinstance(given, list | tuple) else ()
        entries = [(str(p["name"]), p) for p in listed if isinstance(p, Mapping) and "name" in p]
    properties = {name: _property(entry) for name, entry in entries}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    declared = (tool or {}).get("required")
    if isinstance(declared, list | tuple):
        required = [name for name in declared if name in properties]
    else:
        required = [name for name, entry in entries if _is_required(entry)]
    return {**schema, "required": required} if required else schema


_MAY_BE_NULL = ("default", "const", "examples", "enum")


def _without_nulls(schema: Any) -> Any:
    """A JSON schema without the keys whose null means that they are absent, as in tables and
    exports of them."""
    if isinstance(schema, Mapping):
        return {
            key: value if key in _MAY_BE_NULL else _without_nulls(value)
            for key, value in schema.items()
            if value is not None or key in ("default", "const")
        }
    if isinstance(schema, list | tuple):
        return [_without_nulls(value) for value in schema]
    return schema


def _property(entry: Mapping[str, Any]) -> dict[str, Any]:
    written = str(entry.get("type", ""))
    name = type_name(written.partition(",")[0]) if written else None
    kept = {k: v for k, v in entry.items() if k not in ("name", "type", "required", "schema")}
    if isinstance(entry.get("schema"), Mapping):
        return {**kept, **entry["schema"]}
    return {**({"type": name} if name else {}), **kept}


def _is_required(entry: Mapping[str, Any]) -> bool:
    if "required" in entry:
        return str(entry["required"]).lower() == "true"
    return "optional" not in str(entry.get("type", "")) and "default" not in entry


def python_literal(text: str) -> Any:
    """Parse JSON, or a Python literal such as ``{'a': None}``.

    Raises:
        ValueError: It is neither.
    """
    try:
        return loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError("is neither JSON nor a Python literal") from error


def _parsed(text: str) -> Any:
    """The object in the JSON `text`; `text` if it is not one."""
    try:
        value = loads(text)
    except ValueError:
        return text
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((str, "text"), (bool, "true or false"), (int | float, "a number"))
    found = (words for type_, words in kinds if isinstance(value, type_))
    return next(found, "a list" if isinstance(value, Sequence) else type(value).__name__)
