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
Each name is a value of the setting dataset_format. 'auto' selects the format
that reads the most of your columns, and reports it. Your own format is a
function of one row: dataset_format = 'my_format.py:to_messages'."""


def command() -> None:
    """List the dataset formats.

    Each with its columns and an example row.
    """
    from xtuner.data.formats import load_all

    typer.echo("\n\n".join([*map(describe, load_all()), _ENDING]))


def describe(format: Format) -> str:
    """Describe a format: its name, description, columns and an example row."""
    lines = [format.name, f"{_INDENT}{format.description}"]
    lines.append(f"{_INDENT}columns   {', '.join(format.columns)}")
    if format.optional:
        lines.append(f"{_INDENT}optional  {', '.join(format.optional)}")
    return "\n".join([*lines, *(f"{_INDENT}{line}" for line in fold(format.example))])


def fold(value: Any, *, width: int = _WIDTH - len(_INDENT), key: str = "") -> list[str]:
    """Format `value` as JSON lines; values that fit stay on one line, others are indented.

    Args:
        width: Available terminal columns.
        key: The key of `value`, printed before it.
    """
    import json

    prefix = f"{json.dumps(key, ensure_ascii=False)}: " if key else ""
    line = prefix + json.dumps(value, ensure_ascii=False)
    # One column is reserved for a trailing comma.
    if _columns(line) < width or not value or not isinstance(value, list | Mapping):
        return [line]
    inner = width - len(_INDENT)
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    pairs = value.items() if isinstance(value, Mapping) else [("", item) for item in value]
    parts = [fold(item, width=inner, key=k) for k, item in pairs]
    for part in parts[:-1]:
        part[-1] += ","
    return [prefix + opening, *(_INDENT + line for part in parts for line in part), closing]


def _columns(line: str) -> int:
    """Terminal columns of `line`; a wide character takes two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(c) in "WF" else 1 for c in line)
