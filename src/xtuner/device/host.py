"""Memory of the host process: how malloc keeps it, and how much is in use.

glibc returns large freed tensors to the system, and the next step pays for every page again
(0.2-0.5 s of a step of 3 s were page faults). Pages of 2 MiB instead of 4 KiB took 3 to 7 % off a
step.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEEP_BELOW = 2**30
"""Freed memory up to this size stays with the process."""
MADV_HUGEPAGE = 14  # asm-generic/mman-common.h
IN_HUGE_PAGES = 3 * 600 * 2**20
"""For so much memory huge pages are asked for; below the 2 GiB from which malloc gives back."""


def keep_freed_memory() -> bool:
    """Let malloc reuse freed tensors instead of returning them; False where it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, KEEP_BELOW) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    return False


def ask_for_huge_pages() -> bool:
    """Let Linux put what malloc hands out next into pages of 2 MiB, 1.8 GiB of it; whether it may.

    A step walks through matrices whose rows lie a page apart, and finding a page takes long where
    pages are small, longer still in a virtual machine. Most systems give huge pages only to those
    who ask (/sys/kernel/mm/transparent_hugepage/enabled: madvise), for addresses that they hold:
    so malloc's heap is made longer before it is used. That takes addresses, no memory, and is left
    where the system counts addresses. To be called after `keep_freed_memory`.
    """
    if not sys.platform.startswith("linux") or _addresses_are_counted():
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    longer = [libc.malloc(IN_HUGE_PAGES // 3) for _ in range(3)]  # each below KEEP_BELOW
    try:
        answers = [libc.madvise(start, size, MADV_HUGEPAGE) for start, size in _heap()]
    except OSError:
        answers = []
    for block in longer:
        libc.free(block)
    return bool(answers) and not any(answers)


def _addresses_are_counted() -> bool:
    """Whether a process may run out of addresses before it runs out of memory."""
    import resource  # not on Windows

    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return True
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _heap() -> list[tuple[int, int]]:
    """Where malloc's heap begins, and its size in bytes."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16) - int(start, 16)) for start, end in ends]


def memory_mb(device: torch.device) -> float:
    """Peak memory of the GPU, or the memory the process holds now on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
