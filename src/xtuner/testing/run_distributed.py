"""Run a function in several processes of one gloo group on this machine."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def run_distributed(
    function: Callable[..., Any], *args: Any, processes: int = 2, timeout: float = 240.0
) -> list[Any]:
    """Call ``function(*args)`` in every process and return the results by rank.

    Args:
        function: Importable by name (not a lambda or a local function), like its arguments and
            result.
        args: Arguments, the same for every process.
        processes: Number of processes.
        timeout: Seconds after which all processes are killed.

    Raises:
        RuntimeError: A process raised (its traceback is the message), died, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    port = _free_port()
    workers = [
        context.Process(
            target=_work, args=(results, function, args, rank, processes, port), daemon=True
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(found) < processes:
            died = [r for r, w in enumerate(workers) if w.exitcode is not None and r not in found]
            try:
                rank, value, error = results.get(timeout=1.0)
            except queue.Empty:
                if died:
                    codes = [workers[rank].exitcode for rank in died]
                    raise RuntimeError(f"ranks {died} died with exit codes {codes}") from None
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"only ranks {sorted(found)} of {processes} processes returned within "
                        f"{timeout} s"
                    ) from None
                continue
            if error:
                raise RuntimeError(f"process {rank} failed:\n{error}")
            found[rank] = value
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()
    return [found[rank] for rank in range(processes)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    results: Any, function: Callable[..., Any], args: Any, rank: int, processes: int, port: int
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # spinning on shared cores is ten times slower
    }
    import torch

    torch.set_num_threads(1)
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
