"""Ends a process when its parent ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "XTUNER_LAUNCHER_PID"
"""Environment variable with the launcher's process id."""


def end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its launcher dies, which torchrun's workers
    would survive; exit immediately if our launcher has already ended."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER)
    if launcher and os.getppid() != int(launcher):
        sys.exit("the launcher of this process has ended")
