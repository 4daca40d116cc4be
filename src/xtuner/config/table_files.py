"""The TOML tables of the built-in settings and of names of other trainers."""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path
from typing import Any


@functools.cache
def table(name: str) -> dict[str, Any]:
    """The content of ``tables/<name>.toml``."""
    file = Path(__file__).parent / "tables" / f"{name}.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
