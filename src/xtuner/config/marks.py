"""Marks on settings: how the rest of xtuner treats each of them.

A mark says whether a resumed run may change the setting, whether it is a path, when it has no
effect, and its comment in a copied file. A new setting is thus described in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

OnResume = Literal["fixed", "noted", "free"]
"""How a resume treats a changed value: 'fixed' refuses it (weights or optimizer state depend on the
old one), 'noted' warns that the result differs from an uninterrupted run, 'free' ignores it."""


@dataclass(frozen=True)
class Mark:
    """The marks of one setting.

    Attributes:
        resume: How a resume treats a changed value.
        is_path: The value is a file, a folder or a hub name; relative paths are made absolute when
            the settings of a run are recorded.
        comment: A short phrase. A setting with a comment appears in every copied settings file;
            with an empty one it appears without a comment.
        idle: Returns whether the other settings leave this one without effect.
    """

    resume: OnResume = "noted"
    is_path: bool = False
    comment: str | None = None
    idle: Callable[[Any], bool] | None = None


def mark_of(metadata: list[Any]) -> Mark:
    """The mark in the metadata of a pydantic field; the default mark if there is none."""
    return next((item for item in metadata if isinstance(item, Mark)), Mark())


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_as_tuple(value: Any) -> Any:
    """Accept a single string as a list of one."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


def as_pairs(value: Any) -> Any:
    """Convert a dict to sorted pairs, so that settings can be hashed."""
    if isinstance(value, dict):
        return tuple(sorted(value.items(), key=lambda pair: str(pair[0])))
    return tuple(map(tuple, value)) if isinstance(value, list) else value


def as_nested(value: Any) -> Any:
    """Convert dicts and lists at every depth to tuples, so that settings can be hashed."""
    if isinstance(value, dict):
        return tuple(sorted((str(key), as_nested(item)) for key, item in value.items()))
    return tuple(map(as_nested, value)) if isinstance(value, list | tuple) else value


def thawed(value: Any) -> Any:
    """The dicts and lists that `as_nested` was given."""
    if not isinstance(value, tuple):
        return value
    pairs = value and all(
        isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value
    )
    return {k: thawed(v) for k, v in value} if pairs else [thawed(v) for v in value]


Option = bool | int | float | str | None
Options = Annotated[tuple[tuple[str, Option], ...], BeforeValidator(as_pairs)]
"""Names and values: a dict in a settings file, stored as pairs so that settings can be hashed."""
Names = Annotated[tuple[tuple[str, str], ...], BeforeValidator(as_pairs)]
"""Names by names: a dict in a settings file."""
Nested = Annotated[tuple[tuple[str, Any], ...], BeforeValidator(as_nested)]
"""Names and values of any kind: a dict in a settings file."""
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
OneOrMore = Annotated[tuple[str, ...], BeforeValidator(one_as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]
Betas = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    BeforeValidator(_as_tuple),
]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
AboveZero = Annotated[float, Field(gt=0)]
