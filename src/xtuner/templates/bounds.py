"""Bounds on a chat template, which is a program that comes with a model: time, memory, output.

Time is CPU time of this process, so that a busy machine changes nothing. Memory is bounded by the
address space that the process may add while a template renders; a string of gigabytes is then a
`MemoryError` before it is made. Recursion is bounded by Python.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

CPU_SECONDS = 5.0
"""Longest rendering of one conversation; an ordinary one takes less than a thousandth of it."""
MEMORY = 2**30
"""Bytes that rendering may add to the process."""
MAX_GROWTH, SPARE_OUTPUT = 50, 10_000_000
"""An output may have `SPARE_OUTPUT` characters, and `MAX_GROWTH` for each one that is given."""

_lock = threading.Lock()
_inside = 0
_before: tuple[int, int] | None = None


class OutOfBoundsError(Exception):
    """A template exceeds a bound; the message names it."""


@contextlib.contextmanager
def bounded(*, cpu_seconds: float = CPU_SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Limit the time and memory of the block.

    Systems without ``/proc`` or signals have fewer bounds.

    Raises:
        OutOfBoundsError: A limit is exceeded.
    """
    try:
        with _memory_limit(memory), _time_limit(cpu_seconds):
            yield
    except MemoryError as error:
        raise OutOfBoundsError(f"takes more than {memory / 2**30:.0f} GiB of memory") from error
    except RecursionError as error:
        raise OutOfBoundsError("calls itself without end") from error


def check_output(characters: int, *, given: int) -> None:
    """Raise OutOfBoundsError if `characters` is too much output for `given` characters."""
    if characters > SPARE_OUTPUT + MAX_GROWTH * given:
        raise OutOfBoundsError(f"writes {characters:,} characters where {given:,} are given")


def _time_limit(seconds: float) -> contextlib.AbstractContextManager[None]:
    if threading.current_thread() is not threading.main_thread():
        return _thread_limit(seconds)
    return _signal_limit(seconds)


@contextlib.contextmanager
def _signal_limit(seconds: float) -> Iterator[None]:
    """Bound the CPU time of the process, by a signal, which only the main thread gets."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfBoundsError(f"takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _LateError(OutOfBoundsError):
    """Raised in a thread from outside, which passes no arguments."""


@contextlib.contextmanager
def _thread_limit(seconds: float) -> Iterator[None]:
    """Bound the CPU time of this thread, which another thread watches."""
    ident = threading.get_ident()
    if not hasattr(time, "pthread_getcpuclockid"):
        yield
        return
    clock = time.pthread_getcpuclockid(ident)
    latest = time.clock_gettime(clock) + seconds
    ended, raising, late = threading.Event(), threading.Lock(), threading.Event()

    def watch() -> None:
        while not ended.wait(seconds / 10):
            with raising:
                if not ended.is_set() and time.clock_gettime(clock) > latest:
                    late.set()
                    _raise_in(ident, _LateError)
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        except _LateError:
            late.clear()
            raise
        finally:
            with raising:
                ended.set()
            if late.is_set():  # the error comes within this loop, not after the block
                for _ in range(10_000):
                    pass
    except _LateError:
        raise OutOfBoundsError(f"takes more than {seconds:g} s") from None


def _raise_in(ident: int, error: type[Exception]) -> None:
    """Raise `error` in the thread `ident` at its next instruction.

    Do not withdraw it: CPython 3.11 would then look for it forever, and hang under a debugger.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error))


@contextlib.contextmanager
def _memory_limit(memory: int) -> Iterator[None]:
    """Limit the address space; blocks of several threads share the limit of the first."""
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _lower_limit(memory)
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside and _before is not None:
                import resource

                resource.setrlimit(resource.RLIMIT_AS, _before)


def _lower_limit(memory: int) -> tuple[int, int] | None:
    """Allow `memory` more than is in use; return the previous limit, None if it is unchanged."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        before = resource.getrlimit(resource.RLIMIT_AS)
        if any(0 <= old < limit for old in before):
            return None
        resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    except (ImportError, OSError, ValueError):
        return None
    return before
