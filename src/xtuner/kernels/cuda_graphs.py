"""Record work on a GPU once and launch it again as one CUDA graph.

Replaying a graph takes the host some microseconds, whatever the number of kernels in it. It reads
and writes the same memory as the recording, so inputs are copied into persistent tensors.
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
    """Records with `torch.cuda.graph`; the graphs of one recorder share memory, so they must be
    replayed in the order of recording. Do not record again after all graphs are deleted: torch
    (2.11) fails an assertion when it records into a pool that no graph uses any more.
    """

    def __init__(self) -> None:
        self._pool: tuple[int, int] = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """See `Recorder.record`.

        Raises:
            RuntimeError: `function` waits for the GPU, or does something else that a graph cannot.
        """
        graph = torch.cuda.CUDAGraph()
        options = {"pool": self._pool, "stream": self._stream}
        # "thread_local": another thread that loads data may allocate pinned memory
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):  # type: ignore[arg-type]
            result = function()
        return result, graph.replay
