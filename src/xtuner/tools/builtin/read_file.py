"""The files of one folder: ``read_file:FOLDER``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

MOST_BYTES = 100_000


def limited_to(folder: str) -> Callable[[str], str]:
    """The tool for `folder`."""
    root = Path(folder).expanduser().resolve()

    def read_file(path: str) -> str:
        """Read a text file, or list a folder.

        Args:
            path: The path of the file, relative to the shared folder; . lists it.
        """
        # resolve() follows links, so a link that leads out of the folder is refused
        found = (root / path).resolve()
        if not found.is_relative_to(root):
            raise PermissionError(f"{path!r} is outside the shared folder")
        if found.is_dir():
            entries = sorted(found.iterdir())[:200]
            return "\n".join(f"{e.name}/" if e.is_dir() else e.name for e in entries) or "(empty)"
        if not found.is_file():
            raise FileNotFoundError(f"there is no file {path!r}")
        # the file may become a link after the check: links are not followed
        handle = os.open(found, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(handle, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        if b"\0" in content:
            raise ValueError(f"{path!r} is not a text file")
        text = content[:MOST_BYTES].decode("utf-8", "replace")
        more = f"\n(cut after {MOST_BYTES:,} bytes)" if len(content) > MOST_BYTES else ""
        return text + more

    return read_file


NEEDS = "read_file:FOLDER"
"""The syntax of the tool's name: it takes a folder."""
