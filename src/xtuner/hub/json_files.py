"""The JSON files next to a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`; empty if the file is missing, damaged or holds something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def write_object(file: Path, values: dict[str, Any]) -> None:
    """Write `values` in the style of config.json."""
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    if any("\ud800" <= character <= "\udfff" for character in text):  # UTF-8 has none of them
        text = json.dumps(values, indent=2) + "\n"
    file.write_text(text, encoding="utf-8")
