"""Make the packs of a run out of its settings, and account for every row on the way.

sources ─prepare─► files + formats ─encode─► rows on disk (cached) ─overlong─► samples
        ─mix─► rows of an epoch ─set aside─► training | validation ─pack─► PackedDataset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.config.schema import Settings
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.packing import order
from xtuner.data.packing.mix import mixed_rows, set_aside
from xtuner.data.packing.order import Ints
from xtuner.data.packing.overlong import fit, policy_of
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.plan_cache import planned
from xtuner.data.packing.samples import SampleTable, samples_of
from xtuner.data.report.account import (
    Encoded,
    Room,
    duplicate_notes,
    num_duplicates,
    refuse_unusable,
)
from xtuner.data.report.data_report import DataReport, PartReport
from xtuner.data.sources.resolve import prepare
from xtuner.data.tokenize.encode import Encoding
from xtuner.errors import DataError
from xtuner.templates.base import Template
from xtuner.types import Algorithm


@dataclass(frozen=True)
class TrainingData:
    """The packs to train on, those to measure the loss on, and the account of all rows."""

    train: PackedDataset
    validation: PackedDataset | None
    report: DataReport


def build(
    settings: Settings,
    *,
    template: Template,
    tokenizer: Any,
    folder: Path,
    algorithm: Algorithm,
    image_layout: ImageLayout | None,
    report_dir: Path | None = None,
    quiet: bool = False,
) -> TrainingData:
    """Make the data of a run.

    Args:
        settings: the part about data and `seed` count.
        template: lays out conversations.
        tokenizer: of the model that is trained.
        folder: where relative paths are looked up first: that of the settings file.
        algorithm: which records it takes, and which sequences it makes of them.
        image_layout: how images are laid out; None for a model without a vision tower. Every caller
            says it, for a model that sees reads the same rows as another.
        report_dir: where data_report.json is written; None writes none.
        quiet: show no progress.

    Raises:
        DataError: a source cannot be read, or there is nothing to learn in it.
        ConfigError: there is no format of that name.
    """
    sources = prepare(settings, folder=folder)
    encoding = Encoding(
        settings,
        template=template,
        tokenizer=tokenizer,
        folder=folder,
        quiet=quiet,
        algorithm=algorithm,
        image_layout=image_layout,
    )
    stores = [encoding.store(source) for source in sources]
    policy, room = policy_of(settings, algorithm), room_of(settings, image_layout)
    encoded = [
        Encoded(
            source, store, fit(store, source=i, max_length=room.tokens, policy=policy), room, policy
        )
        for i, (source, store) in enumerate(zip(sources, stores, strict=True))
    ]
    refuse_unusable(encoded)
    data = _Assembly(settings, encoded, room, algorithm.sequences_per_row).data()
    if report_dir is not None:
        data.report.write(report_dir)
    return data


def room_of(settings: Settings, image_layout: ImageLayout | None) -> Room:
    """How long a sample of the run may be."""
    return Room(settings.max_length, image_layout.tokens_each if image_layout else 0)


class _Assembly:
    """Choose rows among all usable ones, which are numbered through all sources, and pack them."""

    def __init__(
        self, settings: Settings, encoded: Sequence[Encoded], room: Room, sequences_per_row: int
    ) -> None:
        self._settings, self._max_length = settings, room.tokens
        self._longest = room.tokens * sequences_per_row  # of a row, and of a pack
        self._encoded = encoded
        self._samples = SampleTable.joined([each.fitted.samples for each in encoded])
        self._starts = self._samples.row_starts()
        self._source_of_row = self._samples.source[self._starts[:-1]]

    def data(self) -> TrainingData:
        """Mix, set aside, pack and report."""
        learnt, aside = self._chosen_rows()
        train = self._packed(learnt)
        validation = self._packed(aside) if len(aside) else None
        return TrainingData(train, validation, self._report(train, validation, learnt, aside))

    def _chosen_rows(self) -> tuple[Ints, Ints]:
        s = self._settings
        rows = mixed_rows(
            self._rows_a_source(np.arange(len(self._source_of_row))),
            repeats=s.data_repeats,
            weights=s.data_weights,
            limit=s.max_dataset_length,
            seed=s.seed,
        )
        learnt, aside = set_aside(rows, ratio=s.validation_ratio, seed=s.seed)
        if not len(learnt):
            raise DataError(
                f"no row is left to train on: the mix has {len(np.unique(rows))} rows and "
                f"validation_ratio is {s.validation_ratio}; add data, or change the mix"
            )
        return learnt, aside

    def _rows_a_source(self, rows: Ints) -> list[int]:
        counts: list[int] = np.bincount(
            self._source_of_row[rows], minlength=len(self._encoded)
        ).tolist()
        return counts

    def _packed(self, rows: Ints) -> PackedDataset:
        """Lay the samples of `rows` out in packs, or each in one of its own."""
        s = self._settings
        own = self._samples.take(samples_of(rows, self._starts))
        numbers = np.arange(len(own), dtype=np.int64)
        members, starts = numbers, np.arange(len(own) + 1, dtype=np.int64)
        if s.packs:
            taken = order.permutation(len(own), "pack", s.seed) if s.shuffle else numbers
            members, starts = self._packed_by_kind(own, taken)
        stores = [each.store for each in self._encoded]
        return PackedDataset(
            stores, samples=own.take(members), starts=starts, max_length=self._max_length
        )

    def _packed_by_kind(self, own: SampleTable, taken: Ints) -> tuple[Ints, Ints]:
        """Pack in order; with group_by_modality samples with images and the others each by
        themselves."""
        s = self._settings
        if not (s.shuffle and s.group_by_modality):
            return planned(own.length, self._longest, order=taken)
        image_model = own.has_images([each.store for each in self._encoded])[taken]
        if image_model.all() or not image_model.any():
            return planned(own.length, self._longest, order=taken)
        parts = [
            planned(own.length, self._longest, order=taken[image_model == kind]) for kind in (1, 0)
        ]
        (first, ends), (second, more) = parts
        return np.concatenate([first, second]), np.concatenate([ends, more[1:] + len(first)])

    def _report(
        self, train: PackedDataset, validation: PackedDataset | None, learnt: Ints, aside: Ints
    ) -> DataReport:
        s = self._settings
        learnt = np.flatnonzero(np.bincount(learnt))  # once each
        used = self._rows_a_source(np.concatenate([learnt, aside]))
        hashes = self._hashes()
        return DataReport(
            sources=tuple(
                each.report(rows_used=count)
                for each, count in zip(self._encoded, used, strict=True)
            ),
            train=PartReport.of(train, self._longest),
            validation=None if validation is None else PartReport.of(validation, self._longest),
            max_length=self._longest,
            packed=s.packs,
            duplicates=num_duplicates(hashes[learnt], hashes[aside]),
            notes=(
                *(note for each in self._encoded for note in each.source.notes),
                *duplicate_notes(hashes[learnt], hashes[aside]),
                *self._notes_on_images(train),
            ),
        )

    def _notes_on_images(self, train: PackedDataset) -> list[str]:
        """Notes on rows without images; an error where only images could teach anything."""
        s = self._settings
        if not s.has_vision or train.any_images:
            return []
        if s.llm_training == "frozen":
            raise DataError(
                "not one row has an image, and the language model is frozen: nothing would be "
                "learned. Give rows with images, or train the language model (tuning = 'qlora')"
            )
        return ["not one row has an image: projector and vision tower learn nothing"]

    def _hashes(self) -> Any:
        """The hash of each usable row's tokens."""
        rows = self._samples.row[self._starts[:-1]]
        return np.concatenate(
            [
                each.store.hashes[rows[self._source_of_row == number]]
                for number, each in enumerate(self._encoded)
            ]
        )
