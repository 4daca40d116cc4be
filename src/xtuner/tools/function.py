"""The schema of a Python function, from its type hints and docstring."""

from __future__ import annotations

import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from xtuner.errors import ConfigError

_PLAIN = {
    str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", set: "array", dict: "object",
}  # fmt: skip
_ARGS = re.compile(r"^\s*(?:Args|Arguments|Parameters):\s*$")
_SECTION = re.compile(r"^\s*(?:Returns|Raises|Yields|Examples?|Notes?):\s*$")
_ENTRY = re.compile(r"^\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_SPHINX = re.compile(r"^\s*:param\s+(?:[\w\[\], ]+\s+)?(\w+):\s*(.*)$")


def schema_of(function: Callable[..., Any], *, name: str | None = None) -> dict[str, Any]:
    """The schema of `function` as a tool: its name, the first paragraph of its docstring, and its
    parameters from its type hints, described by the docstring's ``Args:`` section.

    Raises:
        ConfigError: A parameter has no type hint, or one without a JSON type.
    """
    called = name or function.__name__
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise ConfigError(f"tool {called!r}: its type hints cannot be read: {error}") from error
    description, words = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ConfigError(
                f"tool {called!r}: takes {parameter}; a tool has named parameters with type hints"
            )
        if parameter.name not in hints:
            raise ConfigError(
                f"tool {called!r}: the parameter {parameter.name!r} has no type hint, such as "
                f"{parameter.name}: str"
            )
        schema = _schema(hints[parameter.name], f"tool {called!r}, parameter {parameter.name!r}")
        if text := words.get(parameter.name):
            schema = {**schema, "description": text}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    parameters |= {"required": required} if required else {}
    inner = {"name": called, "description": description, "parameters": parameters}
    return {"type": "function", "function": inner}


def _schema(hint: Any, where: str) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        schema = _schema(arguments[0], where)
        words = next((word for word in arguments[1:] if isinstance(word, str)), None)
        return {**schema, "description": words} if words else schema
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _union(arguments, where)
    if origin is Literal:
        return _choices(arguments)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint])
    if origin in (list, set, frozenset, tuple, Sequence):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return {"type": "array", **({"items": _schema(items[0], where)} if items else {})}
    if origin in (dict, Mapping):
        more = {"additionalProperties": _schema(arguments[1], where)} if arguments else {}
        return {"type": "object", **more}
    if hint in _PLAIN:
        return {"type": _PLAIN[hint]}
    if typing.is_typeddict(hint):
        inner = typing.get_type_hints(hint)
        fields = {key: _schema(value, where) for key, value in inner.items()}
        required = sorted(hint.__required_keys__)
        return {"type": "object", "properties": fields, "required": required}
    raise ConfigError(
        f"{where}: the type {hint!r} has no JSON equivalent; use str, int, float, bool, list, "
        "dict, Literal, an Enum, or a union of these"
    )


def _union(arguments: Sequence[Any], where: str) -> dict[str, Any]:
    parts = [_schema(argument, where) for argument in arguments]
    names = [part.get("type") for part in parts]
    if all(len(part) == 1 and isinstance(part.get("type"), str) for part in parts):
        kept = [name for name in names if name != "null"]
        return {"type": kept[0], "nullable": True} if len(kept) == 1 else {"type": names}
    return {"anyOf": parts}


def _choices(values: Sequence[Any]) -> dict[str, Any]:
    kinds = {_PLAIN.get(type(value)) for value in values}
    kind = {"type": kinds.pop()} if len(kinds) == 1 and None not in kinds else {}
    return {**kind, "enum": list(values)}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and the description of each parameter."""
    first = text.partition("\n\n")[0]
    lead: list[str] = []
    for line in first.splitlines():
        if _ARGS.match(line) or _SPHINX.match(line):
            break
        lead.append(line.strip())
    words: dict[str, str] = {}
    current, inside, margin = "", False, 0
    for line in text.splitlines():
        if _ARGS.match(line):
            inside, margin = True, len(line) - len(line.lstrip())
        elif match := _SPHINX.match(line):
            words[match[1]] = match[2].strip()
        elif inside and (_SECTION.match(line) or (line.strip() and _margin(line) <= margin)):
            inside = False
        elif inside and (match := _ENTRY.match(line)):
            current = match[1]
            words[current] = match[2].strip()
        elif inside and current and line.strip():
            words[current] = f"{words[current]} {line.strip()}".strip()
    return " ".join(lead).strip(), words


def _margin(line: str) -> int:
    return len(line) - len(line.lstrip())
