"""Parse ``--set key=value``, typed by the schema."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from xtuner.config.check import accepts, unknown_override
from xtuner.config.read.entries import Problem, parse_constant
from xtuner.config.renames import dotted


def read(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Parse overrides; the last one of a name wins.

    Returns:
        The values by name, and the problems of the overrides that are not settings.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for override in overrides:
        name, equals, text = (piece.strip() for piece in override.partition("="))
        name = dotted().get(name, name)
        unknown = unknown_override(name, text)
        if equals and "." in name:
            problems.append(Problem(f"--set {override}", _no_tables(name)))
        elif not equals or not name.isidentifier():
            problems.append(Problem(f"--set {override}", "write --set name=value"))
        elif unknown:
            problems.append(unknown)
        else:
            values[name] = _typed(name, text)
    return values, problems


def _no_tables(name: str) -> str:
    return (
        f"{name} is a name of XTuner 0.x; settings here have plain names, and "
        "`xtuner explain` lists them"
    )


def _typed(name: str, text: str) -> Any:
    """The value of `text` that setting `name` accepts: a Python literal, a constant, or `text`."""
    candidates: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidates.append(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        with contextlib.suppress(ValueError):
            candidates.append(parse_constant(text))
    candidates.append(text)
    return next((value for value in candidates if accepts(name, value)), candidates[0])
