"""Read ``--set key=value``, typed by the schema."""

from __future__ import annotations

import ast
import contextlib
import warnings
from collections.abc import Sequence
from typing import Any

from xtuner.config.check import accepts, unknown_override
from xtuner.config.read.entries import Problem, spoken_constant


def read(overrides: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """Read overrides; a later one of the same name wins.

    Returns:
        The values by name, and the problems of those that name no setting.
    """
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for override in overrides:
        name, equals, text = (piece.strip() for piece in override.partition("="))
        unknown = unknown_override(name, text)
        if not equals or not name.isidentifier():
            problems.append(Problem(f"--set {override}", "write --set name=value"))
        elif unknown:
            problems.append(unknown)
        else:
            values[name] = _typed(name, text)
    return values, problems


def _typed(name: str, text: str) -> Any:
    """The reading of `text` that setting `name` takes: a Python literal, a word, or the text."""
    candidates: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            candidates.append(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        with contextlib.suppress(ValueError):
            candidates.append(spoken_constant(text))
    candidates.append(text)
    return next((value for value in candidates if accepts(name, value)), candidates[0])
