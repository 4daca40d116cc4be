"""Recognize out-of-memory errors of all libraries."""

from __future__ import annotations

import errno
import re

import torch

_WORDS = re.compile(
    r"can't allocate memory"  # torch's CPU allocator on Linux,
    r"|not enough memory"  # and on other systems
    r"|out of memory"  # CUDA errors other than torch.OutOfMemoryError
    r"|_STATUS_ALLOC_FAILED"  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is an allocation failure on a GPU or a CPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None
    )
