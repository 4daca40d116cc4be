"""Check the entries of a settings file against the schema and describe every problem."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from pydantic import ValidationError

from xtuner import plugins
from xtuner.config.combinations import ALGORITHMS, CHECKS
from xtuner.config.describe import allowed, choices
from xtuner.config.read import hints
from xtuner.config.read.entries import OVERRIDE, Entry, Problem, Reading, parse_constant
from xtuner.config.renames import no_counterpart, own_value, replaced_by, unknown_setting
from xtuner.config.schema import ALIASES, Settings, field_parts
from xtuner.errors import count, did_you_mean, shell_command

_PLUGINS = {
    "algorithm": ALGORITHMS,
    "dataset_format": "xtuner.data.formats",
    "strategy": "xtuner.engine.strategies",
}
_TEMPLATES = "xtuner.templates"
_MAX_UNKNOWN = 100
"""Up to this many unknown names are listed; a suggestion takes time for each."""
_MAX_INSPECTED = 1_000
_MAX_LISTED = 8
"""A message lists up to this many allowed values; for longer lists it names `xtuner explain`."""
_CONTROL_SIGN = (
    "contains a line break, tab or other control character, which \\n and \\t in quotes mean; "
    "write the path with / instead of each backslash"
)
_TUNINGS = choices("tuning")
_PLACEHOLDERS: dict[str, Any] = {
    name: "-" for name, field in Settings.model_fields.items() if field.is_required()
}


def check(reading: Reading) -> tuple[Settings | None, list[Problem]]:
    """Check the entries of a settings file.

    Returns:
        The settings and the problems found here. The settings are None if there are problems here
        or in `reading`.
    """
    problems = _resolve_aliases(reading)
    known = {
        name: replace(entry, value=_converted(name, entry.value))
        for name, entry in reading.entries.items()
        if name in Settings.model_fields
    }
    given = itertools.islice(reading.entries, _MAX_INSPECTED)
    replaced = {setting for name in given for setting in replaced_by(name)}
    unknown = ((n, e) for n, e in reading.entries.items() if n not in known)
    problems += [
        entry.problem(name, unknown_setting(name, entry.value))
        for name, entry in itertools.islice(unknown, _MAX_UNKNOWN)
    ]
    if more := sum(1 for _ in unknown):
        rest = count(more, "more name is not a setting", "more names are not settings")
        problems.append(Problem("the file", rest))
    invalid = _invalid_fields({name: entry.value for name, entry in known.items()})
    for name in filter(invalid.__contains__, field_parts()):
        if name in known:
            problems.append(known[name].problem(name, _wrong_value(name, known[name].value)))
        elif name not in reading.broken and name not in replaced:
            purpose = " ".join((Settings.model_fields[name].description or "").split())
            problems.append(Problem(name, f"is missing; set it: {purpose}"))
    valid = {n: e.value for n, e in known.items() if n not in invalid and n not in reading.broken}
    settings = Settings.model_validate({**_PLACEHOLDERS, **valid})
    unusable = invalid | reading.broken
    for name, message in [*_wrong_names(settings, unusable), *_clashes(settings, unusable)]:
        entry = known.get(name)
        problems.append(entry.problem(name, message) if entry else Problem(name, message))
    complete = not problems and not reading.problems
    return (settings if complete else None), problems


def _resolve_aliases(reading: Reading) -> list[Problem]:
    """Move entries from aliases to the real names; return a problem for each setting given twice.

    An override replaces the file's value under either name.
    """
    problems = []
    for alias, name in ALIASES.items():
        if alias in reading.broken:
            reading.broken = {*reading.broken - {alias}, name}
        entry = reading.entries.pop(alias, None)
        if entry is None:
            continue
        other = reading.entries.get(name)
        if other is not None and not (entry.overrides or other.overrides):
            problems.append(
                entry.problem(alias, f"is an alias of {name}, which is also set; keep one")
            )
        if other is None or entry.overrides:
            reading.entries[name] = entry
    return problems


def _converted(name: str, value: Any) -> Any:
    """`value` as setting `name` takes it: the value of another trainer renamed, 3.0 as 3."""
    value = own_value(name, value)
    if isinstance(value, str) and value.lower() in choices(name):
        return value.lower()
    integral = isinstance(value, float) and value.is_integer() and not accepts(name, value)
    return int(value) if integral else value


def accepts(name: str, value: Any) -> bool:
    """Whether `value` is valid for setting `name`, regardless of other settings."""
    return name not in _invalid_fields({name: value})


def unknown_override(name: str, text: str) -> Problem | None:
    """The problem of ``--set name=text`` if there is no such setting."""
    if name in Settings.model_fields or name in ALIASES:
        return None
    return Entry(text, OVERRIDE).problem(name, unknown_setting(name))


def _invalid_fields(values: Mapping[str, Any]) -> set[str]:
    """Names of settings that are missing or have an invalid value."""
    try:
        Settings.model_validate(dict(values))
    except ValidationError as error:
        return {str(e["loc"][0]) for e in error.errors(include_url=False, include_context=False)}
    return set()


def _wrong_value(name: str, value: Any) -> str:
    message = f"must be {allowed(name)}"
    if instead := no_counterpart(name, value):
        return f"{message}; {instead}"
    if (number := _spread_number(value)) and accepts(name, number):
        return f"{message}; write {number} without commas"
    if not isinstance(value, str):
        return message
    if (instead := hints.plain(value)) != value and _unquoted(name, instead):
        return f"{message}; write {instead}"
    if _unquoted(name, value):
        return f"{message}; write it without quotes"
    if re.fullmatch(r"\(.*\)", instead):
        return f"{message}; write [{instead[1:-1]}]"
    if share := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value):
        part = float(share[1]) / 100
        if accepts(name, part):
            return f"{message}; write the share as a number: {part:g}"
        if instead := no_counterpart(name, part):
            return f"{message}; {instead}"
    if name == "tuning" and value in plugins.names(ALGORITHMS):
        return f"{value!r} is a value of 'algorithm'; 'tuning' {message}"
    return message + did_you_mean(value, choices(name))


def _unquoted(name: str, text: str) -> bool:
    """Whether `text` is a number or constant that setting `name` accepts."""
    for unquote in (int, float, parse_constant):
        with contextlib.suppress(ValueError):
            if accepts(name, unquote(text)):
                return True
    return False


def _spread_number(value: Any) -> int | None:
    """The number that was written with commas, as in 2,048; None for other values."""
    if isinstance(value, tuple | list) and all(type(item) is int for item in value):
        value = ",".join(map(str, value))
    with_commas = isinstance(value, str) and re.fullmatch(r"\d{1,3}(,\d{3})+", value)
    return int(value.replace(",", "")) if with_commas else None


def named_parts(name: str) -> list[str]:
    """Names of the plug-ins or templates that setting `name` accepts; empty for other settings."""
    if name in _PLUGINS:
        return [*(["auto"] if name == "dataset_format" else []), *plugins.names(_PLUGINS[name])]
    if name == "prompt_template":
        # Templates are a higher layer, so this module may not import them statically.
        return list(importlib.import_module(_TEMPLATES).names())
    return []


def _wrong_names(settings: Settings, unusable: set[str]) -> Iterator[tuple[str, str]]:
    """Yield a problem for every setting that names an unknown plug-in or template."""
    for setting, value in _values(settings, Settings.paths(), unusable):
        if any(ord(sign) < 32 for sign in value):
            yield setting, _CONTROL_SIGN
    for setting, value in _values(settings, (*_PLUGINS, "prompt_template"), unusable):
        known = named_parts(setting)
        if setting == "algorithm" and value in _TUNINGS:
            yield setting, f"{value!r} is a value of 'tuning'; set tuning = {value!r}"
        elif setting == "strategy" and value.endswith(".json"):
            continue
        elif value not in known and not plugins.is_user_path(value):
            yield setting, _wrong_name(setting, value, known)


def _values(
    settings: Settings, names: Iterable[str], unusable: set[str]
) -> Iterator[tuple[str, str]]:
    """The usable ones of the settings `names`, each with every value that it has."""
    for name in filter(lambda name: name not in unusable, names):
        given = getattr(settings, name)
        for value in [given] if isinstance(given, str) else given or ():
            yield name, value


def _wrong_name(setting: str, value: str, known: list[str]) -> str:
    instead = no_counterpart(setting, value)
    guess = f"; {instead}" if instead else did_you_mean(value, known)
    if len(known) > _MAX_LISTED:
        rest = f"; `{shell_command('xtuner', 'explain', setting)}` lists them"
        own = "; 'auto' is the template of the tokenizer" if setting == "prompt_template" else ""
        return f"unknown value {value!r}{guess or own or rest}"
    names = ", ".join(map(repr, known))
    return f"must be one of {names}, or your own 'my_file.py:object'{guess}"


def _clashes(settings: Settings, unusable: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the problems of combinations; rules that read an unusable setting are skipped."""
    readable = cast(Settings, _Readable(settings, unusable))
    for rule in CHECKS:
        try:
            yield from rule(readable)
        except _UnusableError:
            continue


class _UnusableError(Exception):
    pass


class _Readable:
    """Settings that raise on access to a setting that has a problem of its own."""

    def __init__(self, settings: Settings, unusable: set[str]) -> None:
        self._settings = settings
        self._unusable = unusable

    def __getattr__(self, name: str) -> Any:
        if name in self._unusable:
            raise _UnusableError
        derived = getattr(Settings, name, None)
        if isinstance(derived, property) and derived.fget:
            return derived.fget(self)
        return getattr(self._settings, name)
