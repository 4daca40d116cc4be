"""Names and values of other trainers, and their equivalents here."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.config.schema import field_parts
from xtuner.config.table_files import table
from xtuner.errors import closest, did_you_mean

_LISTS = ("lora_target_modules", "lora_modules_to_save", "report_to")
"""List settings that other trainers write as a comma-separated string."""

_KINDS = {
    "eval": "eval", "evaluation": "eval", "val": "eval", "validation": "eval", "test": "eval",
    "save": "save", "checkpoint": "save", "logging": "log", "log": "log",
    "lora": "lora", "dora": "dora", "batch": "batch", "warmup": "warmup", "max": "max",
    "sequence": "sequence", "seq": "sequence", "visual": "visual", "vision": "visual",
    "dataset": "data", "data": "data", "lr": "lr",
}  # fmt: skip
"""Topic words of a name; names with different topics are not similar."""

_ALIKE = 0.75
"""How alike a name and the setting that it misspells are; less alike, they share words at most."""
_MISSPELLED = 0.85
"""The same for names of other trainers, which are more."""


def advice(name: str) -> str | None:
    """What to write instead of `name`, a setting of another trainer; None if it is unknown."""
    return (
        _advice_by_name().get(name)
        or _advice_by_name().get(name.lower())
        or next((text for start, text in _families() if name.startswith(start)), None)
    )


def replaced_by(name: str) -> tuple[str, ...]:
    """The settings that replace `name`; () if there are none."""
    text = advice(name) or ""
    if not text.startswith("use "):
        return ()
    settings = field_parts()
    return tuple(word for word in re.findall(r"[A-Za-z_]\w*", text) if word in settings)


def explained_as(name: str) -> str | None:
    """The setting that corresponds to `name` of another trainer; None unless there is exactly one
    first."""
    settings = field_parts()
    return next(iter(replaced_by(name)), None) if name not in settings else None


def unknown_setting(name: str, value: Any = True) -> str:
    """Describe the replacement of a name that is not a setting.

    Args:
        value: Its value. A name of another trainer that is off or empty may need no replacement.
    """
    if found := advice(name):
        return _if_off(name, value, found) or found
    known, others = list(field_parts()), _advice_by_name()
    if same := _spelled_like(name, known):
        return f"unknown setting; did you mean '{same}'?"
    if other := _spelled_like(name, list(others)):
        return f"unknown setting; {other!r} of other trainers {_as_clause(others[other])}"
    alike = [k for k in known if _kind(k) == _kind(name)]
    if guess := did_you_mean(name, alike, cutoff=_ALIKE):
        return f"unknown setting{guess}"
    if other := closest(name, list(others), cutoff=_MISSPELLED):
        return f"unknown setting; {other!r} of other trainers {_as_clause(others[other])}"
    return "unknown setting; `xtuner explain` lists all settings"


def _if_off(name: str, value: Any, text: str) -> str | None:
    """What to do about a name with advice `text` whose `value` is false or empty; None if it is
    the same as for other values."""
    empty = value is None or (isinstance(value, str | Sequence | Mapping) and not value)
    if not empty and value is not False:
        return None
    if off := table("renamed")["off"].get(name):
        return str(off)
    switched_on = re.match(r"use \w+ = [^;]*$", text.partition(";")[0])
    return f"is {'empty' if empty else 'off'}; remove it" if empty or switched_on else None


def _spelled_like(name: str, known: Sequence[str]) -> str | None:
    """The name in `known` that differs only in case and underscores."""
    return next((k for k in known if _letters(k) == _letters(name)), None)


def _letters(name: str) -> str:
    return name.lower().replace("_", "")


def _as_clause(text: str) -> str:
    return f"is {text.removeprefix('use ')} here" if text.startswith("use ") else text


def own_value(name: str, value: Any) -> Any:
    """The value of setting `name` that corresponds to another trainer's `value`."""
    if name in _LISTS and isinstance(value, str) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    if name in _LISTS and isinstance(value, list) and len(value) == 1:
        value = value[0]  # ["all"] and ["none"] mean the same as the word alone
    found = table("values").get(name, {}).get(_word(value), value)
    return None if found == "None" else found


def no_counterpart(name: str, value: Any) -> str | None:
    """What to do instead of a `value` of another trainer that setting `name` does not have."""
    texts = _instead_of_values(name)
    text = texts.get(_word(value))
    if text is None and isinstance(value, int | float) and not isinstance(value, bool):
        text = texts.get("share" if 0 < value < 1 else "count" if value >= 1 else "")
    return f"{value!r} {text}" if text and text.startswith("is ") else text


@functools.cache
def _instead_of_values(name: str) -> dict[str, str]:
    """What to do instead of each value that setting `name` does not have."""
    tables = table("values")
    alike = (row for row in tables["alike"] if row["setting"] == name)
    shared = {value: row["text"] for row in alike for value in row["values"]}
    return {**tables["not"].get(name, {}), **shared}


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, str | int | float | None) else ""


def dotted() -> dict[str, str]:
    """Names of mmengine configs in the syntax of ``--cfg-options``, and the equivalent settings."""
    names: dict[str, str] = table("renamed")["dotted"]
    return names


def _kind(name: str) -> frozenset[str]:
    """The topic words of a name; misspelled words are ignored."""
    return frozenset(_KINDS[word] for word in name.lower().split("_") if word in _KINDS)


@functools.cache
def _advice_by_name() -> dict[str, str]:
    tables = table("renamed")
    found = dict(tables["absent"])
    found |= {n: f"is not needed: {text}; remove it" for n, text in tables["needless"].items()}
    return found | {n: f"use {text}" for n, text in tables["use"].items()}


@functools.cache
def _families() -> list[tuple[str, str]]:
    """Beginnings of names, longest first."""
    return sorted(table("renamed")["families"].items(), key=lambda row: -len(row[0]))
