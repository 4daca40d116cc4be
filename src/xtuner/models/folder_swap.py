"""Replaces a folder by a new one; an interruption at any moment loses neither."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

_ASIDE = re.compile(r"\.(.+)\.replaced")


def replace_folder(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; an existing folder is moved aside first and deleted last.

    An interruption between the two renames leaves the old folder as ``.NAME.replaced``, which
    `recover` brings back.
    """
    aside = target.with_name(f".{target.name}.replaced")
    if target.exists():
        os.rename(target, aside)
    os.rename(draft, target)
    shutil.rmtree(aside, ignore_errors=True)


def recover(parent: Path) -> None:
    """Finish or undo an interrupted `replace_folder` in `parent`."""
    for aside in parent.glob(".*.replaced"):
        match = _ASIDE.fullmatch(aside.name)
        target = parent / match[1] if match else aside
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):  # another process of the run did it first
                os.rename(aside, target)
