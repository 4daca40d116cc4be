"""Reject cached files that other users of this machine can write."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def refuse_others(path: Path, *, use: str = "its code would be run") -> None:
    """Raise if a user other than this one and root can write `path`.

    Args:
        path: A file or folder of the cache.
        use: What the files are used for; part of the message.

    Raises:
        PermissionError: Another user can write to it.
    """
    if os.name != "posix":
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"other users can write to {path}, and {use}; delete it, or choose "
            "another folder with XTUNER_CACHE"
        )
