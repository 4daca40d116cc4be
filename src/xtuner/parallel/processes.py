"""The processes that train together: the rank of this one, and reductions over all of them.
Gradients are summed once per step, in float32. Unlike DistributedDataParallel, this allows ranks
with different numbers of batches, parameters without a gradient, and one exact divisor over all
ranks.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from xtuner.errors import LaunchError
from xtuner.parallel.activity import busy
from xtuner.parallel.collective import waiting
from xtuner.parallel.layout import RankLayout
from xtuner.parallel.parent import end_with_parent
from xtuner.parallel.rendezvous import PATIENCE, client, join_group
from xtuner.parallel.ulysses import SequenceGroup
from xtuner.parallel.watch import Watch

BUCKET_NUMBERS = 16 * 2**20
"""Gradients are summed in buckets of about this many elements (64 MB in float32)."""

LARGE_NUMBERS = 2**20
"""A gradient of this many elements (4 MB in float32) is summed in place."""


class Processes:
    """This process and its process groups.

    Args:
        device: 'cpu' or 'cuda'; with several GPUs each process uses its own.
        sequence_parallel_size: Number of ranks that share the tokens of a row.
        hang_timeout: Seconds without progress after which the processes report where each of them
            is; 'auto' derives them from earlier steps (see `watch`), None disables the check.

    Attributes:
        rank: Rank of this process among all.
        world_size: Number of processes.
        layout: The rank as data rank and sequence rank.
        device: The device of this process.
        sequence: The ranks that share the tokens of their rows; None if each has its own rows.
        node: Index of this machine.
        nodes: Number of machines.
        node_leader: Rank of the first process on this machine.

    Raises:
        LaunchError: The processes cannot be split into groups of `sequence_parallel_size`.
    """

    def __init__(
        self,
        device: str,
        *,
        sequence_parallel_size: int = 1,
        hang_timeout: float | Literal["auto"] | None = None,
    ):
        join_group(device)
        patience = {"timeout": PATIENCE} if "RANK" in os.environ else {}
        self._state = PartialState(cpu=device == "cpu", **patience)
        self.rank: int = self._state.process_index
        self.world_size: int = self._state.num_processes
        self.layout = RankLayout(self.rank, self.world_size, sequence_parallel_size)
        self.device: torch.device = (
            self._state.device if self.world_size > 1 else torch.device(device)
        )
        self.sequence: SequenceGroup | None = None
        if sequence_parallel_size > 1:
            self.sequence = SequenceGroup(
                _own_group(self.layout.sequence_groups(), self.rank),
                rank=self.layout.sequence_rank,
                size=sequence_parallel_size,
            )
        local, on_node = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE")
        self.node = int(os.environ.get("GROUP_RANK", "0")) if self.world_size > 1 else 0
        self.nodes = -(-self.world_size // int(on_node)) if on_node else 1
        self.node_leader = self.rank - int(local) if self.world_size > 1 else 0
        self._alone: str | None = None
        # Another launcher may keep its store over restarts, with the keys of the attempt before.
        self._prefix: str = self.gather([secrets.token_hex(8)])[0]
        self._watch: Watch | None = None
        if self.world_size > 1:
            end_with_parent()
            if hang_timeout is not None:
                timeout = None if hang_timeout == "auto" else hang_timeout
                self._watch = Watch(
                    self.rank, self.world_size, timeout=timeout, connect=self._connect
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints to the terminal."""
        return self.rank == 0

    @cached_property
    def store(self) -> Any:
        """The store that all processes can read and write at any time, over a separate
        connection. It is empty at first."""
        return self._connect()

    def _connect(self) -> Any:
        return PrefixStore(self._prefix, client())

    @property
    def data_rank(self) -> int:
        """Which rows this process takes."""
        return self.layout.data_rank

    @property
    def data_world_size(self) -> int:
        """Number of ranks that take different rows."""
        return self.layout.data_world_size

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over all processes, in float64."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def of_rows(self, numbers: Sequence[float]) -> list[float]:
        """This process's contribution to sums over all rows, from the `numbers` of its own rows:
        zeros if another process contributes for the same rows."""
        return [number if self.layout.sequence_rank == 0 else 0.0 for number in numbers]

    def max(self, number: float) -> float:
        """The largest `number` of all processes."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def _reduced(self, numbers: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        with self._together("a sum"):
            dist.all_reduce(total, operation)
            return total.tolist()  # type: ignore[no-any-return]

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in rank order."""
        if self.world_size == 1:
            return items
        found: list[list[Any]] = [[] for _ in range(self.world_size)]
        with self._together("a message to all"):
            dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Broadcast `tensor` from the main process; the others' tensors are overwritten."""
        if self.world_size > 1:
            with self._together("a broadcast"):
                dist.broadcast(tensor, src=0)
        return tensor

    def sum_gradients(
        self, parameters: Iterable[Tensor], *, gather: Callable[[], Iterable[Tensor]] | None = None
    ) -> None:
        """Replace every gradient by its sum over all processes; a missing one counts as zero. A
        gradient that all processes lack stays None, as on a single process: a zero gradient would
        still update an optimizer's moments.

        Args:
            parameters: The same parameters on every process.
            gather: Collects the gradients in buffers, once all processes have the same ones, and
                returns the tensors that they are gradients of.
        """
        if self.world_size == 1:
            return
        everything = list(parameters)
        counts = self.sum([float(parameter.grad is not None) for parameter in everything])
        for parameter, count in zip(everything, counts, strict=True):
            if count and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        found = gather() if gather else everything
        bucket: list[Tensor] = []
        started: list[Any] = []
        for gradient in [p.grad for p in found if p.grad is not None]:
            if _can_be_summed_alone(gradient):
                with waiting("the sum of gradients"):
                    started.append(dist.all_reduce(gradient, async_op=True))
                continue
            bucket.append(gradient)
            if sum(g.numel() for g in bucket) >= BUCKET_NUMBERS:
                _sum_bucket(bucket)
                bucket = []
        if bucket:
            _sum_bucket(bucket)
        for work in started:
            with waiting("the sum of gradients"):
                work.wait()

    def form_group(self) -> None:
        """Ensure that a process group exists: FSDP2 and DeepSpeed need one even for a single
        process. Such a group is not destroyed, because DeepSpeed reuses it in the next run."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    @contextmanager
    def without_others(self, who: str) -> Iterator[None]:
        """Refuse collective calls inside the block, which only this process executes.

        Args:
            who: What runs in the block, for the message.
        """
        self._alone = who if self.world_size > 1 else None
        try:
            with busy(who):
                yield
        finally:
            self._alone = None

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Guard a collective call, which would wait forever if the others do not make it."""
        if self._alone is not None:
            raise LaunchError(
                f"{self._alone} runs only on the main process, but makes a collective call: set "
                f"`collective = True` in its class"
            )
        with waiting(what):
            yield

    def close(self) -> None:
        """Leave the process group, at the end of a run that all processes have reached."""
        if self._watch is not None:
            self._watch.stop()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _can_be_summed_alone(gradient: Tensor) -> bool:
    """Whether a gradient is so large that copying it into a bucket takes longer than a call."""
    wide = gradient.dtype in (torch.float32, torch.float64)
    return wide and gradient.is_contiguous() and gradient.numel() >= LARGE_NUMBERS


def _sum_bucket(gradients: list[Tensor]) -> None:
    wide = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    flat = torch.cat([g.reshape(-1).to(wide) for g in gradients])
    with waiting("the sum of gradients"):
        dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _own_group(groups: list[list[int]], rank: int) -> Any:
    """Create all `groups`, as every process must, and return the group of `rank`."""
    made = [(dist.new_group(ranks), ranks) for ranks in groups]
    return next(group for group, ranks in made if rank in ranks)
