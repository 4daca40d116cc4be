"""The runs in a folder of work dirs."""

from __future__ import annotations

from pathlib import Path

from xtuner.errors import CheckpointError
from xtuner.runs.folder import RunFolder


def work_dirs(folder: Path) -> list[RunFolder]:
    """The runs in `folder`, the one that started last first; links out of it are left out."""
    found = []
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.name.startswith(".") or path.resolve().parent != folder.resolve():
            continue
        try:
            found.append(RunFolder(path))
        except CheckpointError:
            continue
    return sorted(found, key=lambda run: run.starts[-1].name, reverse=True)
