"""What the rest of xtuner does with a setting, written at the setting itself.

Whether a resumed run may change it, whether it names files, when it has no effect, and the comment
it gets in a copied file are derived from these marks, so a new setting is described in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

OnResume = Literal["fixed", "noted", "free"]
"""What a resume does with a changed value: 'fixed' refuses it (weights or optimizer state were made
with the old one), 'noted' says that the run is no longer the straight one, 'free' ignores it."""


@dataclass(frozen=True)
class Mark:
    """The marks of one setting.

    Attributes:
        resume: what a resume does with a changed value. The default is the careful one.
        is_path: names a file or a folder, or a hub name; a relative path is resolved when the
            settings of a run are recorded.
        comment: one short phrase; a setting that has a comment is in every copied settings file.
            An empty one is in the file without a comment.
        idle: whether the other settings leave this one without effect.
    """

    resume: OnResume = "noted"
    is_path: bool = False
    comment: str | None = None
    idle: Callable[[Any], bool] | None = None


def mark_of(metadata: list[Any]) -> Mark:
    """The mark among the metadata of a pydantic field; the default one where there is none."""
    return next((item for item in metadata if isinstance(item, Mark)), Mark())


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_as_tuple(value: Any) -> Any:
    """Accept a single string for a list of one."""
    return (value,) if isinstance(value, str) else _as_tuple(value)


def as_pairs(value: Any) -> Any:
    """A dict as sorted pairs, so that settings can be hashed."""
    if isinstance(value, dict):
        return tuple(sorted(value.items(), key=lambda pair: str(pair[0])))
    return tuple(map(tuple, value)) if isinstance(value, list) else value


Option = bool | int | float | str | None
Options = Annotated[tuple[tuple[str, Option], ...], BeforeValidator(as_pairs)]
"""Names and values: a dict in a settings file, kept as pairs so that settings can be hashed."""
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
