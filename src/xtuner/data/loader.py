"""Hand out the batches of each optimizer step.

What is in a step is a pure function of (seed, epoch, step): the packs of an epoch are put in order,
cut into groups (one a step), each group into micro-batches, and micro-batch j of a group goes to
rank j modulo the number of ranks. So a resumed run, or one on another number of ranks with the same
number of micro-batches a step, sees the same data. No global random state is read or changed.
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
        dataset: the packs.
        collate: makes a batch of samples.
        batch_size: packs a micro-batch.
        accumulative_counts: micro-batches a step and rank.
        seed: fixes the order of every epoch.
        shuffle: False keeps the order of the packs in every epoch.
        rank, world_size: this process and the number of processes.
        num_workers: processes that build batches ahead; 0 builds them when they are asked for.
        pin_memory: keep batches where a GPU copies them from fastest.
        grouped: put packs of one modality and of like length together in a micro-batch.

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
            raise DataError("the data set is empty: there is nothing to load")
        self._micro_batches = _MicroBatches(dataset, collate)
        self._num_packs = len(dataset)
        self._batch_size = batch_size
        self._packs_a_step = batch_size * accumulative_counts * world_size
        self._seed, self._shuffle = seed, shuffle
        self._kinds = (dataset.has_images, dataset.lengths) if grouped else None
        self._rank, self._world_size = rank, world_size
        self._num_workers = num_workers
        self._pin = pin_memory
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last group may be smaller than the others."""
        return -(-self._num_packs // self._packs_a_step)

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of the first rank in an epoch; another may have one less."""
        return -(-self._num_packs // (self._batch_size * self._world_size))

    def groups(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step from `start_step` to `stop_step` - 1.

        Steps count from 0 over all epochs. A list is empty where the last group of an epoch has no
        micro-batch left for this rank. Ask for many steps at once: with `num_workers`, every call
        starts the processes anew.
        """
        batches = self._batches(start_step, stop_step)
        for step in range(start_step, stop_step):
            yield [next(batches) for _ in self._share(step)]

    def filler(self) -> Batch:
        """A micro-batch of the first pack, for a forward pass that counts nothing."""
        return self._micro_batches[[0]]

    def _batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        wanted = (packs for step in range(start_step, stop_step) for packs in self._share(step))
        made = (
            (self._micro_batches[p] for p in wanted)
            if not self._num_workers
            else self._ahead(wanted)
        )
        for batch in made:
            yield batch.moved(lambda tensor: tensor.pin_memory()) if self._pin else batch

    def _ahead(self, wanted: Iterator[list[int]]) -> Iterator[Batch]:
        loader: DataLoader[Batch | XTunerError] = DataLoader(
            _FaultsAsItems(self._micro_batches),
            sampler=wanted,  # type: ignore[arg-type]  # an item of ours is the list of a micro-batch's packs
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_is,  # type: ignore[arg-type]  # without batch_size it gets one item
            worker_init_fn=_ignore_interrupt,
            # a generator of its own: without one, torch would draw from the global random state
            generator=torch.Generator(),
        )
        for made in loader:
            if isinstance(made, XTunerError):
                raise made
            yield made

    def _share(self, step: int) -> list[list[int]]:
        """The packs of each micro-batch that this rank works on in `step`."""
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self._packs_a_step
        group = self._epoch_order(epoch)[first : first + self._packs_a_step]
        starts = range(
            self._rank * self._batch_size, len(group), self._world_size * self._batch_size
        )
        return [group[start : start + self._batch_size].tolist() for start in starts]

    def _make_epoch_order(self, epoch: int) -> order.Ints:
        if not self._shuffle:
            return np.arange(self._num_packs, dtype=np.int64)
        drawn = order.permutation(self._num_packs, "epoch", self._seed, epoch)
        if self._kinds is None or self._batch_size == 1:
            return drawn
        kinds, lengths = self._kinds
        return order.grouped(
            drawn, kinds, lengths, size=self._batch_size, key=("groups", self._seed, epoch)
        )


class _MicroBatches(Dataset[Batch]):
    """Packs looked up by a list of their numbers, collated."""

    def __init__(self, dataset: PackedDataset, collate: Collate) -> None:
        self._dataset = dataset
        self._collate = collate

    def __getitem__(self, packs: list[int]) -> Batch:
        return self._collate([sample for pack in packs for sample in self._dataset[pack]])


class _FaultsAsItems(Dataset[Batch | XTunerError]):
    """Hands the faults of rows on as items: torch would raise them with a worker's traceback."""

    def __init__(self, micro_batches: _MicroBatches) -> None:
        self._micro_batches = micro_batches

    def __getitem__(self, packs: list[int]) -> Batch | XTunerError:
        try:
            return self._micro_batches[packs]
        except XTunerError as error:
            return error


def _as_is(item: Batch | XTunerError) -> Batch | XTunerError:
    return item


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the training decides when its workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
