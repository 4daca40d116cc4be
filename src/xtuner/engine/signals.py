"""A run that is asked to stop ends its step first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop; `can_resume` tells whether there is a checkpoint to go on from."""

    def __init__(self, message: str = "", *, can_resume: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume


class StopRequest:
    """Whether the process was asked to stop.

    Attributes:
        made: set by the first Ctrl-C or SIGTERM.
    """

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take Ctrl-C and SIGTERM as requests; a second Ctrl-C stops at once.

        Only the main thread may set handlers; in another one nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.made and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.made = True

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
