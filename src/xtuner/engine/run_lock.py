"""Allows one run at a time in a work dir. The operating system's lock on ``WORK_DIR/run.lock`` is
released when its process ends, however that happens. It is a POSIX lock, which belongs to a single
process: with flock, a worker that outlives a killed run by some seconds would keep the lock. The
file contains the process that has the lock. On a file system without locks a warning is logged.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from xtuner.errors import LaunchError
from xtuner.parallel.activity import busy

FILE_NAME = "run.lock"
_POLL_SECONDS = 5.0

logger = logging.getLogger("xtuner.engine")


@contextlib.contextmanager
def hold(
    work_dir: Path, *, wait: bool = False, poll_seconds: float = _POLL_SECONDS
) -> Iterator[None]:
    """Hold the lock of `work_dir`, which is created if necessary.

    Args:
        wait: Wait while another run holds the lock, and print which one. Of several runs that
            wait, one gets the lock; the others wait for it in turn.
        poll_seconds: How often a waiting run tries to take the lock.

    Raises:
        LaunchError: Another run holds the lock and `wait` is False; the message has its process,
            machine and start time.
    """
    with _locked(work_dir, poll_seconds if wait else None) as file:
        file.truncate(0)
        json.dump(_own(), file)
        file.flush()
        yield
        file.truncate(0)


def refuse_if_held(work_dir: Path) -> None:
    """Raise the LaunchError of `hold` if another process holds the lock of `work_dir`."""
    with contextlib.suppress(OSError), (work_dir / FILE_NAME).open("r+", encoding="utf-8") as file:
        if not _take(file):
            raise _held(work_dir, file)


def wait_until_free(work_dir: Path, *, poll_seconds: float = _POLL_SECONDS) -> None:
    """Wait until no run holds the lock of `work_dir`, and print which one does.

    Another run may take the lock before this one does: `hold` must wait as well.
    """
    if (work_dir / FILE_NAME).is_file():
        _locked(work_dir, poll_seconds).close()


def is_held(work_dir: Path) -> bool:
    """Whether another process holds the lock of `work_dir`. A process that holds it must not call
    this: closing the file would release the lock.
    """
    try:
        with (work_dir / FILE_NAME).open("r+", encoding="utf-8") as file:
            return not _take(file)
    except FileNotFoundError:
        return False


def holder_pid(work_dir: Path) -> int | None:
    """The process on this machine that holds the lock of `work_dir`; None if there is none."""
    if not is_held(work_dir):
        return None
    try:
        holder = json.loads((work_dir / FILE_NAME).read_text(encoding="utf-8"))
        return int(holder["pid"]) if holder["host"] == socket.gethostname() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _locked(work_dir: Path, poll_seconds: float | None) -> TextIO:
    """The opened lock file, locked until it is closed.

    While another process holds the lock, try again every `poll_seconds` seconds and print each
    holder once; None raises a LaunchError.
    """
    announced = ""
    while True:
        work_dir.mkdir(parents=True, exist_ok=True)
        file = (work_dir / FILE_NAME).open("a+", encoding="utf-8")
        if _take(file):
            return file
        with file:
            if poll_seconds is None:
                raise _held(work_dir, file)
            holder = _holder(file)
        if holder != announced:
            print(f"Waiting for the run in {work_dir} ({holder}).", file=sys.stderr, flush=True)
            announced = holder
        with busy(f"waiting for the run in {work_dir}"):
            time.sleep(poll_seconds)


def _take(file: Any) -> bool:
    """Lock `file` until it is closed; return False if another process holds the lock."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        logger.warning(
            "%s: the file system has no locks (%s); make sure that no other run writes to this "
            "work dir", file.name, error.strerror,
        )  # fmt: skip
    return True


def _held(work_dir: Path, file: Any) -> LaunchError:
    return LaunchError(
        f"{work_dir}: another run is writing to it ({_holder(file)}). Use another folder with "
        f"--work-dir DIR, or wait until it ends with --wait"
    )


def _own() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv),
    }


def _holder(file: Any) -> str:
    """The process that holds the lock, according to the file."""
    file.seek(0)
    try:
        holder = dict(json.load(file))
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"
