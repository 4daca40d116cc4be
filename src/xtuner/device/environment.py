"""Environment variables of the libraries, to be set before torch is imported."""

from __future__ import annotations

import os
import sys

SPINS = "2000"
"""How often a waiting OpenMP thread polls before it sleeps (libgomp's default: 300,000). Spinning
threads take the cores from those they wait for. Beside other busy processes small matrix products
take 45 to 55 ms with libgomp's default, 9 ms with this and 8 ms without spinning
(benchmarks/waiting.py). Pauses between the operations of a step are still bridged."""


def set_up_threads() -> None:
    """Make waiting threads sleep soon, unless the user has set the variables.

    Has no effect once torch is imported.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}:
        os.environ["GOMP_SPINCOUNT"] = SPINS


def set_up_memory(device: str) -> None:
    """Enable expandable segments on a GPU, and limit the primitive cache of oneDNN on a CPU.

    Row lengths differ between steps. Expandable segments keep the GPU allocator from
    fragmenting. oneDNN caches compiled code for the last 1,024 shapes, two thirds of a MiB each (a
    step needs about a hundred). Has no effect once torch is imported; variables that the user has
    set are kept. torch 2.8 does not support the first name.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    may_use_gpu = device != "cpu" and sys.platform == "linux"
    if may_use_gpu and not any(name in os.environ for name in names):
        os.environ[names[0]] = "expandable_segments:True"
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "256")
