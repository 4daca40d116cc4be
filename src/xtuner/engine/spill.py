"""Tensors that are gathered one by one and kept on the disk until they are written.

A checkpoint of divided weights needs all of them on the main process at once. They lie in files
that are mapped into memory: the operating system may take their pages back, so that no process
holds the model a second time.
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
    """Keeps copies of tensors in files of `folder` that have no name and leave nothing behind.

    Args:
        folder: on the disk that gets the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fault: Exception | None = None

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` in the CPU's memory, or in a file if it is large.

        Where that fails it returns an empty tensor, and `check` tells later: the other processes
        are in the middle of gathering.
        """
        if self._fault is None:
            try:
                return self._kept(tensor)
            except (OSError, MemoryError, RuntimeError) as error:
                self._fault = error
        return tensor.new_empty(0)

    def check(self) -> None:
        """Raise what went wrong, after everything was gathered.

        Raises:
            OSError: the disk is full.
            MemoryError, RuntimeError: memory is.
        """
        if self._fault is not None:
            raise self._fault

    def _kept(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size < SMALL:
            return tensor.detach().to("cpu", copy=True)
        descriptor, name = tempfile.mkstemp(dir=self._folder)
        try:
            if hasattr(os, "posix_fallocate"):  # a hole in a full disk would kill the process
                os.posix_fallocate(descriptor, 0, size)
            storage: Any = torch.UntypedStorage.from_file(name, True, size)
        finally:
            os.close(descriptor)
            os.unlink(name)
        kept: Any = torch.empty(0, dtype=tensor.dtype)
        kept.set_(storage, 0, tensor.shape)
        return kept.copy_(tensor.detach())  # type: ignore[no-any-return]


def as_it_is(tensor: Tensor) -> Tensor:
    """Where every process holds all: no copy."""
    return tensor
