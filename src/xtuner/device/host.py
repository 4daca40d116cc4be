"""Memory of the host process: tuning of malloc, and memory in use.

glibc returns large freed tensors to the system, and the next step faults every page in again
(0.2-0.5 s of a 3 s step). Huge pages of 2 MiB instead of 4 KiB make a step 3 to 7 % faster.
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
"""Size of the heap with huge pages; below 2 GiB, where malloc starts to return memory."""


def keep_freed_memory() -> bool:
    """Make malloc reuse freed tensors instead of returning them; False if it is not glibc."""
    return _set_malloc({M_MMAP_THRESHOLD: KEEP_BELOW, M_TRIM_THRESHOLD: 2**31 - 1})


def return_blocks_from(size: int) -> bool:
    """Make malloc return blocks of `size` bytes or more when they are freed; False if it is not
    glibc.

    Engines that shard weights take and free large buffers, and the heap keeps each of them without
    using it for the next (see `heap`). Call it after `keep_freed_memory`.
    """
    return _set_malloc({M_MMAP_THRESHOLD: size})


def _set_malloc(values: dict[int, int]) -> bool:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        return all(mallopt(name, value) for name, value in values.items())
    return False


def ask_for_huge_pages() -> bool:
    """Enable huge pages for the next 1.8 GiB of malloc's heap; return whether it worked.

    The rows of large matrices are pages apart, so small pages cause TLB misses, which are more
    expensive in a virtual machine. Most systems give huge pages only on request
    (/sys/kernel/mm/transparent_hugepage/enabled: madvise) and for mapped addresses, so the heap is
    extended before it is used. This takes address space but no memory, and is skipped where address
    space is limited. Call it after `keep_freed_memory`.
    """
    if not sys.platform.startswith("linux") or _address_space_is_limited():
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    extension = [libc.malloc(IN_HUGE_PAGES // 3) for _ in range(3)]  # each below KEEP_BELOW
    try:
        answers = [libc.madvise(start, size, MADV_HUGEPAGE) for start, size in _heap()]
    except OSError:
        answers = []
    for block in extension:
        libc.free(block)
    return bool(answers) and not any(answers)


def _address_space_is_limited() -> bool:
    """Whether a process may run out of address space before it runs out of memory."""
    import resource  # not on Windows

    with contextlib.suppress(OSError):
        if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2":
            return True
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _heap() -> list[tuple[int, int]]:
    """Start and size in bytes of malloc's heap."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith("[heap]")]
    return [(int(start, 16), int(end, 16) - int(start, 16)) for start, end in ends]


def memory_mb(device: torch.device) -> float:
    """Peak reserved memory of a GPU, or the present RSS of the process on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    return float(psutil.Process().memory_info().rss) / 2**20
