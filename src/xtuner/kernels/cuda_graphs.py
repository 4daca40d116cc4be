"""Record work on a GPU once and launch it again as one CUDA graph.

Replaying a graph takes the host some microseconds, whatever the number of kernels in it. It reads
and writes the same memory as the recording, so inputs are copied into tensors that stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """Records functions that take and return tensors in fixed memory."""

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """Record `function`.

        Returns:
            The tensor that every replay overwrites, and the replay. The recording itself computes
            nothing on a GPU.
        """
        ...


class CudaRecorder:
    """Records with `torch.cuda.graph`; all graphs share one memory pool.

    Graphs that are replayed one after the other, each with its own output, may share memory.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()
        # torch asserts that a pool is used by a graph (2.11): when a graph is replaced by a larger
        # one, this one still uses it
        self._first = self.record(lambda: torch.zeros(1, device="cuda"))

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """See `Recorder.record`.

        Raises:
            RuntimeError: `function` waits for the GPU, or does something else that a graph cannot.
        """
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": self._stream}
        # "thread_local": loading data in another thread may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):  # type: ignore[arg-type]
            result = function()
        return result, graph.replay
