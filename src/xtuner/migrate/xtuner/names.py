"""Names of XTuner 0.x and their counterparts: the rows of tables/xtuner_old.toml."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[1] / "tables" / "xtuner_old.toml"


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_FILE.read_text(encoding="utf-8"))


def names(table: str) -> dict[str, Any]:
    """The rows of `table`: 'map_fns', 'templates', 'systems', 'not_yet' or 'datasets'."""
    return _table()[table]
