"""How many CPU threads compute: the number that multiplies matrices fastest, measured.

More threads than the machine has physical cores, or than a container may use, make matrix products
slower.
"""

from __future__ import annotations

import time

import torch

from xtuner.kernels.compiled import kernels_for

CLEARLY = 0.75
"""Fewer threads are taken where more reach less than this share of their rate."""

ENOUGH = 0.5
"""Seconds of products after which a rate is known well enough: a type that the CPU has no
instructions for takes seconds per product."""


def choose_threads(wanted: int | None, dtype: torch.dtype, processes: int = 1) -> str:
    """Set torch's CPU threads and return a line that says why so many.

    Args:
        wanted: the user's choice; None tries torch's number (one a core) and half of it, and
            takes the half only where it is clearly faster: what lies between products is not.
        dtype: number type of the matrix products that are tried.
        processes: processes that share the machine.
    """
    if wanted is not None:
        torch.set_num_threads(wanted)
        return f"{wanted} CPU thread(s), as set"
    cores = torch.get_num_threads()
    if processes > 1:  # the launcher has shared the cores out; all would measure at once
        return f"{cores} CPU thread(s) a process"
    if cores == 1:
        return "1 CPU thread"
    rates = {count: matmul_rate(count, dtype) for count in {cores, max(1, cores // 2)}}
    best = max(count for count in rates if rates[count] >= CLEARLY * max(rates.values()))
    torch.set_num_threads(best)
    tried = ", ".join(f"{rates[n] / 1e9:,.0f} GFLOP/s with {n}" for n in sorted(rates))
    return f"{best} CPU thread(s) ({tried})"


def matmul_rate(threads: int, dtype: torch.dtype, *, size: int = 1024, repeats: int = 5) -> float:
    """Best rate of a square matrix product with `threads` threads, in operations per second, of at
    most `repeats` products and as many as take `ENOUGH` seconds.

    Of our own product where this CPU has it, whatever multiplies in the run: torch's is no faster
    with a second thread where there are tile units, but all that lies between products is.
    """
    torch.set_num_threads(threads)
    if dtype == torch.float16:  # few CPUs multiply it; 2 s per product where they do not
        dtype = torch.float32
    a, b = torch.randn(2, size, size).to(dtype)
    kernels, out = kernels_for(a, b), torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        if kernels is not None and kernels.multiplies(size):
            kernels.product(a, b, out)
        else:
            torch.matmul(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
