"""What the user of this machine has agreed to: models whose Python code may run, and work dirs of
their own. Kept in ``trust.json`` of xtuner's cache.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from xtuner.cache_dir import cache_dir

Kind = Literal["remote_code", "work_dirs"]


def remember(kind: Kind, name: str) -> None:
    """Remember that `name` is trusted; has no effect if the cache is not writable."""
    known = _read()
    if name in known.get(kind, []):
        return
    known[kind] = [*known.get(kind, []), name]
    file = _file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        draft.touch(mode=0o600)
        draft.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(draft, file)
    except OSError:
        return


def is_remembered(kind: Kind, name: str) -> bool:
    """Whether `remember` was called for `name` on this machine."""
    return name in _read().get(kind, [])


def canonical(name: str) -> str:
    """A folder's real path; a name on the hub as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def _file() -> Path:
    return cache_dir() / "trust.json"


def _read() -> dict[str, list[str]]:
    """The stored contents; empty if another user could have written the file."""
    file = _file()
    try:
        found = file.stat()
        if os.name == "posix" and (found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022):
            return {}
        known = json.loads(file.read_text(encoding="utf-8"))
        return {str(kind): [str(name) for name in names] for kind, names in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
