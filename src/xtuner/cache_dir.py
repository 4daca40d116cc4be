"""The folder for everything that can be recreated or downloaded again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XTUNER_CACHE``, else ``~/.cache/xtuner``."""
    return Path(os.environ.get("XTUNER_CACHE") or "~/.cache/xtuner").expanduser()
