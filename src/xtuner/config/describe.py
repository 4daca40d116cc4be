"""Describe in words which values a setting takes.

The descriptions are derived from the type annotations of the schema, so messages, ``xtuner
explain`` and the reference page always agree with the checks.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator

from xtuner.config.marks import as_nested, as_pairs, one_as_tuple
from xtuner.config.schema import Settings

_WORDS = {str: "a string", int: "an integer", float: "a number"}


def allowed(name: str, kind: type[Settings] = Settings) -> str:
    """The values that setting `name` takes, such as "an integer, 1 or more, or None"."""
    field = kind.model_fields[name]
    return _describe(field.annotation, list(field.metadata))


def choices(name: str) -> tuple[str, ...]:
    """The string literals that setting `name` takes; empty if it takes any string."""
    return tuple(_literals(Settings.model_fields[name].annotation))


def takes_one(name: str, kind: type[Settings] = Settings) -> bool:
    """Whether setting `name` is a list that may be written as a single string."""
    field = kind.model_fields[name]
    return _takes_one(list(field.metadata))


def _takes_one(metadata: list[Any]) -> bool:
    return _has_validator(metadata, one_as_tuple)


def is_dict(name: str, kind: type[Settings] = Settings) -> bool:
    """Whether setting `name` is a dict in a settings file."""
    return _is_dict(list(kind.model_fields[name].metadata))


def _is_dict(metadata: list[Any]) -> bool:
    return _has_validator(metadata, as_pairs) or _has_validator(metadata, as_nested)


def _has_validator(metadata: list[Any], function: Any) -> bool:
    return any(isinstance(m, BeforeValidator) and m.func is function for m in metadata)


def _literals(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [value for part in get_args(annotation) for value in _literals(part)]
    return []


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return _either([repr(value) for value in arguments])
    if origin in (Union, UnionType):
        return _union(arguments)
    if _is_dict(metadata):
        return "a dict of names and values"
    if origin is tuple:
        return _sequence(arguments, metadata)
    if annotation is bool:
        return "True or False"
    return _WORDS[annotation] + _bounds(metadata)


def _union(members: tuple[Any, ...]) -> str:
    words = [_describe(member, []) for member in members if member is not NoneType]
    if NoneType in members:
        words.append("None")
    return ", or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _sequence(items: tuple[Any, ...], metadata: list[Any]) -> str:
    if Ellipsis not in items:
        return f"{_count(len(items))}, each {_describe(items[0], [])}"
    words = _describe(items[0], []).removeprefix("a ") + "s"
    one = _takes_one(metadata)
    return f"a string or a list of {words}" if one else f"a list of {words}"


def _count(number: int) -> str:
    return {2: "two numbers"}.get(number, f"{number} numbers")


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _bounds(metadata: list[Any]) -> str:
    parts = [p for item in metadata for p in getattr(item, "metadata", [item])]
    bounds = [(kind, getattr(p, kind, None)) for p in parts for kind in ("ge", "gt", "le", "lt")]
    match {kind: bound for kind, bound in bounds if bound is not None}:
        case {"ge": low, "le": high}:
            return f" from {low} to {high}"
        case {"ge": low, "lt": high}:
            return f" >= {low} and < {high}"
        case {"ge": low}:
            return f", {low} or more"
        case {"gt": low}:
            return f" above {low}"
    return ""
