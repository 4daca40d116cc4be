"""Load the batches of each optimizer step.

The data of a step is a pure function of (seed, epoch, step): the packs of an epoch are ordered and
split into groups, one per step; each group is split into micro-batches, and micro-batch j of a
group goes to rank j modulo the number of ranks. A resumed run, or a run on another number of ranks
with the same number of micro-batches per step, therefore sees the same data. No global random state
is read or changed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from xtuner.data.packing import order
from xtuner.data.packing.pack import PackedDataset
from xtuner.errors import DataError, XTunerError
from xtuner.types import Batch, Sample

Collate = Callable[[Sequence[Sample]], Batch]


class Loader:
    """The batches of one rank, step by step.

    Args:
        collate: Combines samples to a batch.
        batch_size: Packs per micro-batch.
        accumulative_counts: Micro-batches per step and rank.
        seed: Determines the order of every epoch.
        shuffle: False keeps the order of the packs in every epoch.
        rank, world_size: Index of this process and the number of processes.
        num_workers: Processes that prepare batches; 0 prepares them in this process.
        pin_memory: Return batches in pinned memory.
        grouped: Group packs of the same modality and similar length into micro-batches.

    Raises:
        DataError: `dataset` is empty.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        collate: Collate,
        batch_size: int,
        accumulative_counts: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        grouped: bool = False,
    ) -> None:
        if len(dataset) == 0:
            raise DataError("the data set is empty")
        self._micro_batches = _MicroBatches(dataset, collate)
        self._num_packs = len(dataset)
        self._batch_size = batch_size
        self._packs_per_step = batch_size * accumulative_counts * world_size
        self._seed, self._shuffle = seed, shuffle
        self._group_keys = (dataset.has_images, dataset.lengths) if grouped else None
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._pin = pin_memory
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch; the last group may be smaller than the others."""
        return -(-self._num_packs // self._packs_per_step)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of rank 0 per epoch; other ranks may have one less."""
        return -(-self._num_packs // (self._batch_size * self._world_size))

    def groups(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step from `start_step` to `stop_step` - 1.

        Steps count from 0 across epochs. A list is empty if the last group of an epoch has no
        micro-batch for this rank. Request many steps at once: with `num_workers`, every call starts
        new processes.
        """
        batches = self._batches(start_step, stop_step)
        for step in range(start_step, stop_step):
            yield [next(batches) for _ in self._packs_of_step(step)]

    def filler(self) -> Batch:
        """A micro-batch of the first pack, for a forward pass that counts nothing."""
        return self._micro_batches[[0]]

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        steps = range(start_step, stop_step)
        indices = (packs for step in steps for packs in self._packs_of_step(step))
        here = (self._micro_batches[packs] for packs in indices)
        for batch in self._from_workers(indices) if self._num_workers else here:
            yield batch.moved(lambda tensor: tensor.pin_memory()) if self._pin else batch

    def _from_workers(self, indices: Iterator[list[int]]) -> Iterator[Batch]:
        loader: DataLoader[Batch | XTunerError] = DataLoader(
            _ErrorsAsItems(self._micro_batches),
            sampler=indices,  # type: ignore[arg-type]  # an index is the list of packs of a micro-batch
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_identity,  # type: ignore[arg-type]  # without batch_size it gets one item
            worker_init_fn=_ignore_interrupt,
            # without a generator, torch would draw from the global random state
            generator=torch.Generator(),
        )
        for item in loader:
            if isinstance(item, XTunerError):
                raise item
            yield item

    def _packs_of_step(self, step: int) -> list[list[int]]:
        """The packs of each micro-batch of this rank in `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self._packs_per_step
        group = self._epoch_order(epoch)[first : first + self._packs_per_step]
        starts = range(
            self._rank * self._batch_size, len(group), self._world_size * self._batch_size
        )
        return [group[start : start + self._batch_size].tolist() for start in starts]

    def _make_epoch_order(self, epoch: int) -> order.Ints:
        if not self._shuffle:
            return np.arange(self._num_packs, dtype=np.int64)
        drawn = order.permutation(self._num_packs, "epoch", self._seed, epoch)
        if self._group_keys is None or self._batch_size == 1:
            return drawn
        has_images, lengths = self._group_keys
        return order.grouped(
            drawn, has_images, lengths, size=self._batch_size, key=("groups", self._seed, epoch)
        )


class _MicroBatches(Dataset[Batch]):
    """Collated micro-batches, indexed by a list of pack numbers."""

    def __init__(self, dataset: PackedDataset, collate: Collate) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, packs: list[int]) -> Batch:
        return self._collate([sample for pack in packs for sample in self._dataset[pack]])


class _ErrorsAsItems(Dataset[Batch | XTunerError]):
    """Returns errors as items, since torch would re-raise them with the traceback of the worker."""

    def __init__(self, micro_batches: _MicroBatches) -> None:
        self._micro_batches = micro_batches

    def __getitem__(self, packs: list[int]) -> Batch | XTunerError:
        try:
            return self._micro_batches[packs]
        except XTunerError as error:
            return error


def _identity(item: Batch | XTunerError) -> Batch | XTunerError:
    return item


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches all processes of the terminal; the main process stops its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
