"""What this process is doing, for the others to read while they wait for it."""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parent.parent)
_FRAMES = 3


@dataclass
class Activity:
    """What the main thread does; other threads read it.

    Attributes:
        doing: where the run is.
        busy: work that the others wait for as long as it takes, such as writing a checkpoint.
        waits_for: the collective call that this process is in.
        since: when that call began, by `time.monotonic`.
    """

    doing: str = ""
    busy: str | None = "the start of the run"
    waits_for: str | None = None
    since: float = 0.0

    def status(self) -> dict[str, Any]:
        """What the others read."""
        waits = self.waits_for
        return {
            "time": time.time(),
            "doing": self.doing,
            "busy": self.busy,
            "waits_for": waits,
            "seconds": time.monotonic() - self.since if waits else 0.0,
            "at": position(),
        }


current = Activity()
"""That of this process."""


@contextmanager
def busy(what: str) -> Iterator[None]:
    """The others wait for the work in this block as long as it takes."""
    before, current.busy = current.busy, what
    try:
        yield
    finally:
        current.busy = before


@contextmanager
def in_call(what: str) -> Iterator[None]:
    """This process is in a collective call."""
    if current.waits_for is not None:
        yield
        return
    current.since, current.waits_for = time.monotonic(), what
    try:
        yield
    finally:
        current.waits_for = None


def position() -> str:
    """Where the main thread is: the innermost lines that are not a library's, innermost first."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) or not name.startswith((*_LIBRARIES, "<")):
            lines.append(f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return ", called by ".join(lines)
