"""A process that another one started ends when that one does."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "XTUNER_LAUNCHER_PID"
"""Where our launcher tells its processes who it is."""


def end_with_parent() -> None:
    """Have Linux ask this process to stop (SIGTERM) when its launcher dies, which torchrun's
    workers would survive; end at once if ours is dead already."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    launcher = os.environ.get(LAUNCHER)
    if launcher and os.getppid() != int(launcher):
        sys.exit("the launcher of this process has ended")
