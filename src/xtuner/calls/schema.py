"""Validate a value against the part of JSON Schema that tools use.

Understood: type (also the names that data sets use, such as 'str' and 'STRING'), enum, const,
properties, required, additionalProperties, items, minItems, maxItems, minimum, maximum,
exclusiveMinimum, exclusiveMaximum, minLength, maxLength, anyOf, oneOf, allOf, nullable, and $ref
within the schema. Other keywords are ignored: an untrusted pattern can take forever, and references
to other files are not followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, list | tuple),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: (
        not isinstance(v, bool)
        and (isinstance(v, int) or (isinstance(v, float) and v.is_integer()))
    ),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_OTHER_NAMES = {
    "str": "string", "text": "string", "int": "integer", "float": "number", "double": "number",
    "num": "number", "bool": "boolean", "list": "array", "tuple": "array", "set": "array",
    "dict": "object", "none": "null",
}  # fmt: skip
_BOUNDS: tuple[tuple[str, Callable[[float, float], bool], str], ...] = (
    ("minimum", lambda v, b: v >= b, "at least"),
    ("maximum", lambda v, b: v <= b, "at most"),
    ("exclusiveMinimum", lambda v, b: v > b, "above"),
    ("exclusiveMaximum", lambda v, b: v < b, "below"),
)
_MAX_DEPTH = 40


def type_name(name: str) -> str | None:
    """The JSON name of a type, which data sets may spell differently; None if unknown."""
    short = name.strip().lower().partition("[")[0].strip()
    short = _OTHER_NAMES.get(short, short)
    return short if short in _TYPES else None


def problems(value: Any, schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the violations of `schema` in `value`, each with its path, such as ``days[0]``."""
    yield from _problems(value, schema, "", _Root(schema), 0)


@dataclass
class _Root:
    """The complete schema, and how many more subschemas are visited: a schema that refers to itself
    in several alternatives would take forever."""

    schema: Mapping[str, Any]
    left: int = 10_000


def _problems(value: Any, schema: Any, path: str, root: _Root, depth: int) -> Iterator[str]:
    root.left -= 1
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or root.left < 0:
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield from _problems(value, _resolved(reference, root.schema), path, root, depth + 1)
        return
    if value is None and schema.get("nullable") is True:
        return
    where = f"{path} " if path else ""
    types = _type_names(schema.get("type"))
    if types and not any(_TYPES[name](value) for name in types):
        yield f"{where}must be {_either(types)}, and is {shown(value)}"
        return
    if isinstance(allowed := schema.get("enum"), list | tuple) and not any(
        _equal(value, item) for item in allowed
    ):
        yield f"{where}must be one of {', '.join(map(shown, allowed))}, and is {shown(value)}"
    if "const" in schema and not _equal(value, schema["const"]):
        yield f"{where}must be {shown(schema['const'])}, and is {shown(value)}"
    if isinstance(value, Mapping):
        yield from _object(value, schema, path, root, depth)
    elif isinstance(value, list | tuple):
        yield from _array(value, schema, path, root, depth)
    elif isinstance(value, str):
        yield from _length(len(value), schema, "Length", "characters", where)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        for key, holds, words in _BOUNDS:
            bound: Any = schema.get(key)
            if _TYPES["number"](bound) and not holds(value, bound):
                yield f"{where}must be {words} {bound}, and is {value}"
    yield from _combined(value, schema, path, root, depth)


def _object(
    value: Mapping[str, Any],
    schema: Mapping[str, Any],
    path: str,
    root: _Root,
    depth: int,
) -> Iterator[str]:
    listed = schema.get("properties")
    known: Mapping[str, Any] = listed if isinstance(listed, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list | tuple) else ():
        if name not in value:
            yield f"{_joined(path, str(name))} is missing"
    more = schema.get("additionalProperties")
    # A tool with listed parameters takes no others, unless its schema allows them.
    closed = more is False or (more is None and bool(known) and depth == 0)
    for name, item in value.items():
        inner = _joined(path, str(name))
        if name in known:
            yield from _problems(item, known[name], inner, root, depth + 1)
        elif closed:
            yield f"{inner} is not a parameter; allowed: {', '.join(known) or 'none'}"
        elif isinstance(more, Mapping):
            yield from _problems(item, more, inner, root, depth + 1)


def _array(
    value: Sequence[Any],
    schema: Mapping[str, Any],
    path: str,
    root: _Root,
    depth: int,
) -> Iterator[str]:
    where = f"{path} " if path else ""
    yield from _length(len(value), schema, "Items", "items", where)
    if isinstance(items := schema.get("items"), Mapping):
        for index, item in enumerate(value):
            yield from _problems(item, items, f"{path}[{index}]", root, depth + 1)


def _length(size: int, schema: Mapping[str, Any], key: str, unit: str, where: str) -> Iterator[str]:
    least, most = schema.get(f"min{key}"), schema.get(f"max{key}")
    if isinstance(least, int) and size < least:
        yield f"{where}must have at least {least} {unit}, and has {size}"
    if isinstance(most, int) and size > most:
        yield f"{where}must have at most {most} {unit}, and has {size}"


def _combined(
    value: Any, schema: Mapping[str, Any], path: str, root: _Root, depth: int
) -> Iterator[str]:
    for part in _list(schema.get("allOf")):
        yield from _problems(value, part, path, root, depth + 1)
    for key in ("anyOf", "oneOf"):
        parts = _list(schema.get(key))
        found = [list(_problems(value, part, path, root, depth + 1)) for part in parts]
        if found and all(found):
            where = f"{path} " if path else ""
            yield f"{where}matches none of the alternatives: {min(found, key=len)[0]}"


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _type_names(declared: Any) -> list[str]:
    """The declared types; none if one is unknown, so that unknown types allow everything."""
    given = [declared] if isinstance(declared, str) else list(_list(declared))
    names = [type_name(name) if isinstance(name, str) else None for name in given]
    return [] if None in names else [name for name in names if name]


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """The part of `root` that ``#/a/b`` refers to; an empty schema if it does not exist."""
    found: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        if part and not (isinstance(found, Mapping) and key in found):
            return {}
        found = found[key] if part else found
    return found if reference.startswith("#") else {}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _either(types: Sequence[str]) -> str:
    articles = [f"an {t}" if t[0] in "aoi" else t if t == "null" else f"a {t}" for t in types]
    return " or ".join(articles)


def _equal(one: Any, other: Any) -> bool:
    """Equality that distinguishes true from 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def shown(value: Any) -> str:
    """A value in a message, with quotes if it is text."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
