"""Keeps gathered tensors on disk until they are written. A checkpoint of sharded weights needs all
of them on the main process at once. They are in memory-mapped files, whose pages the operating
system can evict, so that no process holds a second copy of the model in memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 2**20
"""Bytes below which a tensor stays in memory."""


class Spill:
    """Keeps copies of tensors in unnamed temporary files in `folder`.

    Args:
        folder: A folder on the same disk as the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fault: Exception | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of `tensor` in CPU memory, or in a file if it is large.

        If this fails it returns an empty tensor, and `check` raises the error later, since the
        other processes are still gathering.
        """
        if self._fault is None:
            try:
                return self._kept(tensor)
            except (OSError, MemoryError, RuntimeError) as error:
                self._fault = error
        return tensor.new_empty(0)

    def check(self) -> None:
        """Raise the first error of `keep`, after everything was gathered.

        Raises:
            OSError: The disk is full.
            MemoryError, RuntimeError: Memory is exhausted.
        """
        if self._fault is not None:
            raise self._fault

    def _kept(self, tensor: Tensor) -> Tensor:
        size = tensor.nbytes
        if size < SMALL:
            return tensor.detach().to("cpu", copy=True)
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        try:
            if hasattr(
                os, "posix_fallocate"
            ):  # writing to a sparse file on a full disk would kill the process
                os.posix_fallocate(descriptor, 0, size)
            storage: Any = torch.UntypedStorage.from_file(name, True, size)
        finally:
            os.close(descriptor)
            os.unlink(name)
        kept: Any = torch.empty(0, dtype=tensor.dtype)
        kept.set_(storage, 0, tensor.shape)
        return kept.copy_(tensor.detach())  # type: ignore[no-any-return]


def as_it_is(tensor: Tensor) -> Tensor:
    """The identity, for unsharded tensors: no copy."""
    return tensor
