"""What this process is doing, so that others can judge and report it while they wait."""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parent.parent)
_FRAMES = 3
_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_COMPILERS = (
    "torch/_dynamo/convert_frame.py",
    "torch/_inductor/compile_fx.py",
    "torch/_inductor/async_compile.py",
    "torch/utils/cpp_extension.py",
    "triton/compiler/compiler.py",
    "triton/testing.py",
)

FIRST_STEP = "its first step"
"""What a process is busy with in its first step."""


@dataclass
class Pace:
    """How long the parts of a step have taken, to judge how long one may take.

    A part is the work between two calls of `Activity.progress`, such as reading data or a
    micro-batch. The first step allocates memory and compiles, so it only counts for the second.
    """

    steps: int = 0
    first: float = 0.0
    later: float = 0.0
    most_tokens: int = 0
    tokens: int = 0

    def record(self, seconds: float) -> None:
        """A part took this long."""
        if self.steps == 0:
            self.first = max(self.first, seconds)
        else:
            self.later = max(self.later, seconds)

    def begin(self, tokens: int) -> None:
        """A micro-batch with this many tokens begins."""
        self.most_tokens = max(self.most_tokens, self.tokens)
        self.tokens = tokens

    def expected(self) -> float:
        """The seconds of the slowest part so far, scaled up if the current micro-batch has more
        tokens than any before."""
        slowest = max(self.first, self.later) if self.steps < 2 else self.later
        return slowest * max(1.0, self.tokens / (self.most_tokens or self.tokens or 1))


@dataclass
class Activity:
    """What the main thread is doing; other threads read it.

    Attributes:
        doing: Where the run is.
        busy: Work of unknown length, such as writing a checkpoint; None within an optimizer step.
        waits_for: The collective call that this process is in.
        since: When that call began (`time.monotonic`).
        progressed: When the main thread last made progress (`time.monotonic`).
        pace: How long the parts of a step take.
    """

    doing: str = ""
    busy: str | None = "the start of the run"
    waits_for: str | None = None
    since: float = 0.0
    progressed: float = field(default_factory=time.monotonic)
    pace: Pace = field(default_factory=Pace)
    in_step: bool = False

    def progress(self) -> None:
        """The main thread finished or began a part of its work."""
        now = time.monotonic()
        if self.in_step:
            self.pace.record(now - self.progressed)
        self.progressed = now

    def forgive(self, seconds: float) -> None:
        """Do not count `seconds` in which this process was suspended."""
        self.progressed += seconds
        self.since += seconds

    def status(self) -> dict[str, Any]:
        """The status that the others read."""
        now, compiles = time.monotonic(), _compiles()
        waits = None if compiles else self.waits_for
        return {
            "doing": self.doing,
            "busy": "compilation" if compiles else self.busy,
            "waits_for": waits,
            "seconds": now - self.since if waits else 0.0,
            "quiet": now - self.progressed,
            "expected": self.pace.expected(),
            "blocked": _is_blocked(),
            "at": position(),
        }


current = Activity()
"""The activity of this process."""


@contextmanager
def busy(what: str) -> Iterator[None]:
    """The others wait for the work in this block without a time limit."""
    before, current.busy = current.busy, what
    current.progress()
    try:
        yield
    finally:
        current.busy = before
        current.progress()


@contextmanager
def in_step(number: int) -> Iterator[None]:
    """This block is part of optimizer step `number`: its parts take about as long as those of
    earlier steps, except in the first."""
    before = current.busy
    current.doing = f"step {number}"
    current.busy = None if current.pace.steps else FIRST_STEP
    current.progress()
    current.in_step = True
    try:
        yield
    finally:
        current.progress()
        current.in_step, current.busy = False, before


@contextmanager
def in_call(what: str) -> Iterator[None]:
    """This process is in a collective call."""
    if current.waits_for is not None:
        yield
        return
    current.progress()
    current.since, current.waits_for = time.monotonic(), what
    try:
        yield
    finally:
        current.waits_for = None
        current.progress()


def position() -> str:
    """Where the main thread is: its stack frames outside libraries, innermost first."""
    frame = _main_frame()
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        name = frame.f_code.co_filename
        if name.startswith(_OURS) or not name.startswith((*_LIBRARIES, "<")):
            lines.append(f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return ", called by ".join(lines)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


def _is_blocked() -> bool:
    """Whether the main thread is in a collective call of a library, such as that of a layer whose
    weights are gathered."""
    frame = _main_frame()
    return frame is not None and any(part in frame.f_code.co_filename for part in _COLLECTIVES)


def _compiles() -> bool:
    """Whether a thread compiles a kernel; backward passes on a GPU do so outside the main
    thread."""
    for found in sys._current_frames().values():
        frame: FrameType | None = found
        while frame is not None:
            if frame.f_code.co_filename.endswith(_COMPILERS):
                return True
            frame = frame.f_back
    return False
