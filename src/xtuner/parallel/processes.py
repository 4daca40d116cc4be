"""The processes that train together: who this one is, and sums over all of them.

Gradients are summed by us, once a step, in float32: unlike DistributedDataParallel this allows
ranks with different numbers of batches, parameters without a gradient, and one exact divisor over
all ranks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.errors import LaunchError

BUCKET_NUMBERS = 16 * 2**20
"""Gradients are summed in buckets of about this many numbers (64 MB of float32)."""


class Processes:
    """This process among those that train together.

    Args:
        device: 'cpu' or 'cuda', as chosen; with several GPUs each process takes its own.
    """

    def __init__(self, device: str):
        # The others wait while the main process encodes the data, saves or answers questions.
        patience = {"timeout": timedelta(days=1)} if "RANK" in os.environ else {}
        self._state = PartialState(cpu=device == "cpu", **patience)
        self.rank: int = self._state.process_index
        self.world_size: int = self._state.num_processes
        self.device: torch.device = (
            self._state.device if self.world_size > 1 else torch.device(device)
        )
        if self.world_size > 1:
            _die_with_parent()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over all processes, in float64."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with _all_there():
            dist.all_reduce(total)
        return total.tolist()  # type: ignore[no-any-return]

    def gather(self, words: list[str]) -> list[str]:
        """The words of all processes, in the order of ranks."""
        if self.world_size == 1:
            return words
        found: list[list[str]] = [[] for _ in range(self.world_size)]
        with _all_there():
            dist.all_gather_object(found, words)
        return [word for part in found for word in part]

    def sum_gradients(
        self, parameters: Iterable[Tensor], *, gather: Callable[[], Iterable[Tensor]] | None = None
    ) -> None:
        """Replace every gradient by its sum over all processes; a missing one counts as zero.

        One that all processes lack stays missing, as in a single process: for an optimizer with
        moments a gradient of zeros is another thing.

        Args:
            parameters: the same ones in every process.
            gather: collects the gradients in buffers, once all processes have the same ones, and
                returns what they are then gradients of.
        """
        if self.world_size == 1:
            return
        whole = list(parameters)
        there = self.sum([float(parameter.grad is not None) for parameter in whole])
        for parameter, count in zip(whole, there, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        bucket: list[Tensor] = []
        for gradient in [p.grad for p in (gather() if gather else whole) if p.grad is not None]:
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET_NUMBERS:
                _sum_bucket(bucket)
                bucket = []
        if bucket:
            _sum_bucket(bucket)

    def wait(self) -> None:
        """Wait until every process is here."""
        with _all_there():
            self._state.wait_for_everyone()

    def close(self) -> None:
        """Leave the process group, at the end of a run that all of them have come to."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def _all_there() -> Iterator[None]:
    """Say in plain words that another process is gone; its own message tells why."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LaunchError(
            f"another process of this run ended, so this one cannot go on ({first}); look for its "
            "message. Earlier checkpoints are untouched; go on with --resume"
        ) from error


def _sum_bucket(gradients: list[Tensor]) -> None:
    if len(gradients) == 1 and gradients[0].dtype == torch.float32 and gradients[0].is_contiguous():
        with _all_there():
            dist.all_reduce(gradients[0])
        return
    flat = torch.cat([g.reshape(-1).float() for g in gradients])
    with _all_there():
        dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _die_with_parent() -> None:
    """Have Linux stop this process when its launcher dies, which torchrun's workers would
    survive."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
