"""Memory that stays with the process and is used again and again.

On a CPU fresh pages cost more than the arithmetic on them, and a large block that comes and goes
between tensors that stay leaves gaps behind: hundreds of MiB in one run. A GPU's allocator keeps
its memory itself.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Kept(threading.local):
    """One set for each thread, since two may compute at once."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype], Tensor] = {}


kept = _Kept()


def scratch_buffer(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`size` uninitialised numbers; on a CPU the same each time for one `name`."""
    if device.type != "cpu":
        return torch.empty(size, dtype=dtype, device=device)
    tensor = kept.tensors.get((name, dtype))
    if tensor is None or len(tensor) < size:
        tensor = kept.tensors[name, dtype] = torch.empty(size, dtype=dtype)
    return tensor[:size]
