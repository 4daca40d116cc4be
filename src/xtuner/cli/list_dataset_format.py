"""`xtuner list-dataset-format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from xtuner.data.formats import Format

_WIDTH = 80
_INDENT = "  "
_ENDING = """\
Any of these is a value of the setting dataset_format. 'auto' picks the one that
reads the most of your columns, and says which. For your own, name a function
that takes a row: dataset_format = 'my_format.py:to_messages'."""


def command() -> None:
    """List the dataset formats, each with its columns and a sample row."""
    from xtuner.data.formats import load_all

    typer.echo("\n\n".join([*map(describe, load_all()), _ENDING]))


def describe(format: Format) -> str:
    """Show a format: its name, what it is, its columns and a row."""
    lines = [format.name, f"{_INDENT}{format.description}"]
    lines.append(f"{_INDENT}columns   {', '.join(format.columns)}")
    if format.optional:
        lines.append(f"{_INDENT}optional  {', '.join(format.optional)}")
    return "\n".join([*lines, *(f"{_INDENT}{line}" for line in fold(format.example))])


def fold(value: Any, *, width: int = _WIDTH - len(_INDENT), key: str = "") -> list[str]:
    """Print `value` as JSON: what fits stays on one line, the rest goes a step to the right.

    Args:
        value: what to print.
        width: columns there are, of the terminal.
        key: the key that `value` has, printed before it.
    """
    import json

    before = f"{json.dumps(key, ensure_ascii=False)}: " if key else ""
    line = before + json.dumps(value, ensure_ascii=False)
    # One column is left for the comma that may follow.
    if _columns(line) < width or not value or not isinstance(value, list | Mapping):
        return [line]
    inner = width - len(_INDENT)
    if isinstance(value, Mapping):
        opening, closing = "{", "}"
        parts = [fold(v, width=inner, key=k) for k, v in value.items()]
    else:
        opening, closing = "[", "]"
        parts = [fold(v, width=inner) for v in value]
    for part in parts[:-1]:
        part[-1] += ","
    return [before + opening, *(_INDENT + line for part in parts for line in part), closing]


def _columns(line: str) -> int:
    """Columns of the terminal that `line` takes; a wide character takes two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else 1 for c in line)
