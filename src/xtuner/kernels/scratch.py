"""Scratch memory that is allocated once and reused.

On a CPU, page faults of fresh memory cost more than the arithmetic on it, and large temporary
blocks between long-lived tensors fragment the heap by hundreds of MiB. On a GPU the caching
allocator of torch already reuses memory.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """One set per thread, since several threads may compute at once."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


buffers = _Buffers()


def scratch_buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `size` uninitialised elements; on a CPU each `name` always gets the same memory."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    tensor = buffers.tensors.get((name, dtype))
    if tensor is None or len(tensor) < size:
        tensor = buffers.tensors[name, dtype] = torch.empty(size, dtype=dtype)
    return tensor[:size]
