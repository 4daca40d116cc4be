"""Environment variables of the libraries, to be set before torch is imported."""

from __future__ import annotations

import os
import sys


def set_up_memory(device: str) -> None:
    """Let a GPU's memory grow in place, and keep the matrix library of a CPU from growing.

    Rows differ in length at every step. A GPU's allocator then extends what it holds; oneDNN keeps
    compiled code for the last 1,024 shapes it has seen, two thirds of a MiB each (a step needs some
    hundred). It has no effect after torch is imported; what the user has set stays. torch 2.8 does
    not know the first name yet.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    may_use_gpu = device != "cpu" and sys.platform == "linux"
    if may_use_gpu and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "256")
