"""The processes that train together: who this one is, and sums over all of them.

Gradients are summed by us, once a step, in float32: unlike DistributedDataParallel this allows
ranks with different numbers of batches, parameters without a gradient, and one exact divisor over
all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

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
"""Gradients are summed in buckets of about this many numbers (64 MB of float32)."""


class Processes:
    """This process among those that train together.

    Args:
        device: 'cpu' or 'cuda', as chosen; with several GPUs each process takes its own.
        sequence_parallel_size: ranks that share the tokens of a row.
        hang_timeout: seconds that a collective call may take before this process says where every
            process is; None does not look.

    Attributes:
        rank: of this process among all.
        world_size: number of processes.
        layout: the rank as a data rank and a sequence rank.
        device: of this process.
        data_group: the ranks that take the same part of different rows; None is all of them.
        sequence: the ranks that share the tokens of their rows; None if each has its own.
        node: number of this machine.
        nodes: number of machines.
        node_leader: rank of the first process on this machine.

    Raises:
        LaunchError: the processes cannot be divided into groups of `sequence_parallel_size`.
    """

    _made = 0

    def __init__(
        self,
        device: str,
        *,
        sequence_parallel_size: int = 1,
        hang_timeout: float | None = None,
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
        self.data_group: Any = None
        self.sequence: SequenceGroup | None = None
        if sequence_parallel_size > 1:
            self.data_group = _own_group(self.layout.data_groups(), self.rank)
            self.sequence = SequenceGroup(
                _own_group(self.layout.sequence_groups(), self.rank),
                rank=self.layout.sequence_rank,
                size=sequence_parallel_size,
            )
        local, on_node = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE")
        self.node = int(os.environ.get("GROUP_RANK", "0")) if self.world_size > 1 else 0
        self.nodes = -(-self.world_size // int(on_node)) if on_node else 1
        self.node_leader = self.rank - int(local) if self.world_size > 1 else 0
        self._number = Processes._made
        Processes._made += 1
        self._alone: str | None = None
        self._watch: Watch | None = None
        if self.world_size > 1:
            end_with_parent()
            if hang_timeout is not None:
                self._watch = Watch(
                    self.rank, self.world_size, limit=hang_timeout, connect=self._connect
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    @cached_property
    def store(self) -> Any:
        """What all processes read and write at any time, over a connection of its own."""
        return self._connect()

    def _connect(self) -> Any:
        return PrefixStore(f"processes_{self._number}", client())

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
        """What this process adds to sums over all rows, of `numbers` that belong to its own rows:
        zeros where another one adds those of the same rows."""
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
        """The items of all processes, in the order of ranks."""
        if self.world_size == 1:
            return items
        found: list[list[Any]] = [[] for _ in range(self.world_size)]
        with self._together("a message to all"):
            dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """`tensor` of the main process, in all of them; it is overwritten in the others."""
        if self.world_size > 1:
            with self._together("a broadcast"):
                dist.broadcast(tensor, src=0)
        return tensor

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

    def form_group(self) -> None:
        """Have a process group, as FSDP2 and DeepSpeed need one even where a process is alone; that
        one stays, for DeepSpeed keeps it for the next run."""
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            store = torch._C._distributed_c10d.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1)

    def wait(self) -> None:
        """Wait until every process is here."""
        with self._together("a barrier"):
            self._state.wait_for_everyone()

    @contextmanager
    def without_others(self, who: str) -> Iterator[None]:
        """Refuse collective calls inside the block, where the other processes are not.

        Args:
            who: runs in the block, for the message.
        """
        self._alone = who if self.world_size > 1 else None
        try:
            with busy(who):
                yield
        finally:
            self._alone = None

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """Around a collective call, which would wait for ever where the others do not make it."""
        if self._alone is not None:
            raise LaunchError(
                f"{self._alone} runs on the main process only, and calls what all processes have "
                "to call together: set `collective = True` in its class"
            )
        with waiting(what):
            yield

    def close(self) -> None:
        """Leave the process group, at the end of a run that all of them have come to."""
        if self._watch is not None:
            self._watch.stop()
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _sum_bucket(gradients: list[Tensor]) -> None:
    types = {gradient.dtype for gradient in gradients}
    wide = torch.float64 if torch.float64 in types else torch.float32
    if len(gradients) == 1 and wide in types and gradients[0].is_contiguous():
        with waiting("the sum of gradients"):
            dist.all_reduce(gradients[0])
        return
    flat = torch.cat([g.reshape(-1).to(wide) for g in gradients])
    with waiting("the sum of gradients"):
        dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _own_group(groups: list[list[int]], rank: int) -> Any:
    """Make all `groups`, as every process has to, and return that of `rank`."""
    made = [(dist.new_group(ranks), ranks) for ranks in groups]
    return next(group for group, ranks in made if rank in ranks)
