"""A run that is asked to stop finishes its step first."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from xtuner.parallel.cluster import is_first_process
from xtuner.parallel.launch import stop_signals

_HANGUP = getattr(signal, "SIGHUP", None)


class Interrupted(Exception):
    """The run was asked to stop; `can_resume` tells whether there is a checkpoint to resume
    from."""

    def __init__(self, message: str = "", *, can_resume: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume


class StopRequest:
    """Whether the process was asked to stop.

    Attributes:
        made: Set by the first signal.
    """

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Treat Ctrl-C, SIGTERM and the signals of schedulers and closed terminals as requests.

        A second Ctrl-C stops at once. SIGHUP stays ignored if it is (nohup). Only the main thread
        can set handlers; in other threads nothing changes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            if self.made and number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == _HANGUP:
                _leave_terminal()
            elif not self.made and is_first_process():
                again = "; Ctrl-C again stops now" if number == signal.SIGINT else ""
                with contextlib.suppress(OSError):  # print is not safe in a signal handler
                    os.write(2, f"\nStopping after this step{again}.\n".encode())
            self.made = True

        before = {s: signal.signal(s, ask) for s in stop_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave_terminal() -> None:
    """Redirect terminal output to the null device: the terminal is closed and writes would fail."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            os.dup2(nothing, descriptor)
    os.close(nothing)
