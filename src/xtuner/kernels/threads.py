"""Choose the number of CPU threads by measuring matrix products.

More threads than physical cores, or than a container may use, make matrix products slower.
"""

from __future__ import annotations

import time

import torch

from xtuner.errors import count
from xtuner.kernels.compiled import kernels_for

MIN_RELATIVE_RATE = 0.75
"""Fewer threads are chosen if more threads reach less than this fraction of their rate."""

MAX_SECONDS = 0.5
"""Measuring stops after this time: without instructions for a dtype, one product takes seconds."""


def choose_threads(wanted: int | None, dtype: torch.dtype, processes: int = 1) -> str:
    """Set the number of torch's CPU threads and return a line that gives the number and the reason.

    Args:
        wanted: The user's choice; None measures torch's default (one per core) and half of it, and
            takes the half only if it is clearly faster, because operations other than products
            profit from more threads.
        dtype: Dtype of the measured matrix products.
        processes: Processes that share the machine.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return f"{count(wanted, 'CPU thread')}, as configured"
    cores = torch.get_num_threads()
    if processes > 1:  # the launcher divides the cores; all processes would measure at once
        return f"{count(cores, 'CPU thread')} per process"
    if cores == 1:
        return count(1, "CPU thread")
    rates = {n: matmul_rate(n, dtype) for n in {cores, max(1, cores // 2)}}
    best = max(n for n in rates if rates[n] >= MIN_RELATIVE_RATE * max(rates.values()))
    torch.set_num_threads(best)
    measured = ", ".join(f"{rates[n] / 1e9:,.0f} GFLOP/s with {n}" for n in sorted(rates))
    return f"{count(best, 'CPU thread')} (measured: {measured})"


def matmul_rate(threads: int, dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> float:
    """Best rate of a square matrix product with `threads` threads, in FLOP/s, over at most
    `repeats` products or `MAX_SECONDS`.

    Measures the compiled product if this CPU has it, whichever the run uses: on CPUs with AMX
    torch's product does not get faster with a second thread, but everything else does.
    """
    torch.set_num_threads(threads)
    if dtype == torch.float16:  # few CPUs support it; others take 2 s per product
        dtype = torch.float32
    a, b = torch.randn(2, size, size).to(dtype)
    kernels, out = kernels_for(a, b), torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < MAX_SECONDS:
        start = time.perf_counter()
        if kernels is not None and kernels.multiplies(size):
            kernels.product(a, b, out)
        else:
            torch.matmul(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
