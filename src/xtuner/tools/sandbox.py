"""Run a model's Python code in a separate process, without network and with limits.

The process starts isolated (no site packages, empty environment, an empty folder that is deleted),
limits its memory, CPU time, file sizes and descriptors, and then asks the kernel to refuse, until
it ends: sockets, new processes and programs, signals to others, tracing, mounts (seccomp); and all
files except Python's own, which it may read, and its folder (Landlock, Linux 5.13 or later).

It does not protect against: kernel vulnerabilities; reading Python's own files and system
libraries; use of CPU, memory and disk up to the limits; and, without Landlock, reading this user's
files. It refuses to run code on other systems than Linux on x86-64 and ARM. It does not replace a
virtual machine if the code comes from attackers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10.0
"""CPU time; the wall time is limited to twice as much."""
MEMORY = 512 * 2**20
"""Bytes of address space."""
MOST_CHARACTERS = 10_000
_CHILD = Path(__file__).with_name("sandbox_child.py")


def run_code(code: str, *, seconds: float = SECONDS) -> str:
    """The output of `code`, and the value of its last line; an exception is part of the output.

    Args:
        code: Python code.
        seconds: CPU time that it may take; it is stopped after twice as many seconds.

    Raises:
        RuntimeError: It exceeds a limit, or this machine cannot enforce the limits.
    """
    with (
        tempfile.TemporaryDirectory(prefix="xtuner-python-") as folder,
        tempfile.TemporaryFile() as written,  # a file, so that the limit on file sizes applies
    ):
        command = [sys.executable, "-I", "-S", str(_CHILD), str(seconds), str(MEMORY), folder]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=written,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8", "HOME": folder},
            start_new_session=True,
        )
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the code took more than {2 * seconds:g} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        written.seek(0)
        text = written.read().decode("utf-8", "replace")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise RuntimeError(f"the code took more than {seconds:g} s of CPU time")
    if process.returncode == 3:
        raise RuntimeError(text.strip())
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}\n(cut after {MOST_CHARACTERS:,} characters)"
    return text.rstrip("\n") or "(no output)"
