"""What this process is doing, so that others can report it while they wait."""

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
    """What the main thread is doing; other threads read it.

    Attributes:
        doing: Where the run is.
        busy: Work that the others wait for without a time limit, such as writing a checkpoint.
        waits_for: The collective call that this process is in.
        since: When that call began (`time.monotonic`).
    """

    doing: str = ""
    busy: str | None = "the start of the run"
    waits_for: str | None = None
    since: float = 0.0

    def status(self) -> dict[str, Any]:
        """The status that the others read."""
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
"""The activity of this process."""


@contextmanager
def busy(what: str) -> Iterator[None]:
    """The others wait for the work in this block without a time limit."""
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
    """Where the main thread is: its stack frames outside libraries, innermost first."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) or not name.startswith((*_LIBRARIES, "<")):
            lines.append(f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return ", called by ".join(lines)
