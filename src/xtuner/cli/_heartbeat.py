"""Shows that a command is alive if it has no progress bar and nothing else is printed."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

SILENCE = 2.0
"""Seconds without output after which a dot is written."""
FIRST = 0.6
"""Seconds without any output after which the first line is written."""


class _Watched:
    """A stream that reports every write to its heartbeat."""

    def __init__(self, stream: TextIO, heart: _Heart) -> None:
        self._stream, self._heart = stream, heart

    def write(self, text: str) -> int:
        """Write `text`, on a line of its own after dots."""
        self._heart.beat()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Heart:
    """Writes dots to `stream` from a thread, at most one per `seconds` of silence, and the line
    `first` if nothing was written at the beginning."""

    def __init__(self, stream: TextIO, seconds: float, first: str) -> None:
        self._stream, self._seconds, self._first = stream, seconds, first
        self._last = time.monotonic()
        self._dots = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._owner = os.getpid()

    def beat(self) -> None:
        """Something is written elsewhere: end a line of dots."""
        if os.getpid() != self._owner:  # a forked process has no thread, but perhaps a held lock
            return
        with self._lock:
            self._last = time.monotonic()
            self._first = ""
            if self._dots:
                self._dots = 0
                self._put("\n")

    def run(self) -> None:
        """Write dots until `stop`."""
        while not self._stopped.wait(min(FIRST, self._seconds) / 3):
            with self._lock:
                if self._first and time.monotonic() - self._last >= FIRST:
                    self._last = time.monotonic()
                    self._put(f"{self._first}\n")
                    self._first = ""
                elif time.monotonic() - self._last >= self._seconds:
                    self._last = time.monotonic()
                    self._dots += 1
                    self._put(".")

    def stop(self) -> None:
        """End the thread and the line of dots."""
        self._stopped.set()
        self.beat()

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the reader has closed the pipe
            self._stopped.set()


@contextmanager
def heartbeat(*, on: bool = True, seconds: float = SILENCE, first: str = "") -> Iterator[None]:
    """Write a dot to stderr whenever nothing was written for some seconds.

    Args:
        on: Whether to do so; False if there is a progress bar or spinner.
        seconds: Seconds of silence before a dot.
        first: A line that is written if the command has written nothing for `FIRST` seconds.
    """
    if not on:
        yield
        return
    out, errors = sys.stdout, sys.stderr
    heart = _Heart(errors, seconds, first)
    thread = threading.Thread(target=heart.run, daemon=True, name="heartbeat")
    sys.stdout, sys.stderr = _Watched(out, heart), _Watched(errors, heart)  # type: ignore[assignment]
    thread.start()
    try:
        yield
    finally:
        heart.stop()
        thread.join()
        sys.stdout, sys.stderr = out, errors
