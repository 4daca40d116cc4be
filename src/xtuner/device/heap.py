"""Return freed memory of the heap to the operating system.

glibc before 2.38 (Debian 12, Ubuntu 22.04) rarely reuses an aligned block for another of the same
size (bug 14581), and torch's tensors are aligned: the heap of a QLoRA run of a 1.8B model grows by
gigabytes, although nothing is held.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_STATM = Path("/proc/self/statm")


@dataclass
class Growth:
    """Decides when a process has grown without need.

    A pass of the model takes memory and frees it, and the heap keeps it for the next pass: that is
    a level, not growth. Only what comes on top is returned.

    Attributes:
        level: The resident memory after a pass, in bytes; it falls slowly when passes take less.
        returned_at: The resident memory before memory was returned after the last pass, if it was.
    """

    level: int = 0
    returned_at: int = 0

    def exceeds(self, resident: int) -> bool:
        """Whether memory should be returned now, after a pass that leaves `resident` bytes."""
        if not self.level or resident > 0.9 * self.returned_at > 0:  # a single pass takes that much
            self.level = max(self.level, resident)
        elif resident < self.level:
            self.level = max(resident, int(0.98 * self.level))
        grown = resident > 1.25 * self.level + (256 << 20)
        self.returned_at = resident if grown else 0
        return grown


_growth = Growth()


def trim_if_grown() -> None:
    """Return unused memory if the heap has grown since earlier calls; call after each pass.

    A look takes some microseconds, returning memory some milliseconds. Does nothing where the C
    library has no `malloc_trim`.
    """
    trim = _malloc_trim()
    if trim is not None and _growth.exceeds(_private_bytes()):
        trim(0)


def _private_bytes() -> int:
    """Resident memory that is not backed by a file."""
    _, resident, shared, *_ = map(int, _STATM.read_text(encoding="ascii").split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux" or not _STATM.exists():
        return None
    found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found
