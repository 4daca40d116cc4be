"""Names of XTuner 0.x and their counterparts: the rows of tables/xtuner_old.toml."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

from xtuner.migrate.values import Dotted

_FILE = Path(__file__).parents[1] / "tables" / "xtuner_old.toml"


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def names(table: str) -> dict[str, Any]:
    """The rows of `table`: 'map_fns', 'templates', 'systems', 'not_yet' or 'datasets'."""
    return _table()[table]


def text_of(value: Any) -> str | None:
    """The text of a system message, given as string or as ``SYSTEM_TEMPLATE`` name, or None."""
    if value is None:
        return ""
    path = value.path if isinstance(value, Dotted) else value if isinstance(value, str) else None
    if path is None:
        return None
    _, found, name = path.rpartition("SYSTEM_TEMPLATE.")
    if found and name in names("systems"):
        return str(names("systems")[name])
    return value if isinstance(value, str) else None
