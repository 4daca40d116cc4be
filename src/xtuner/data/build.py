"""Build the packed data of a run from its settings, and account for every row.

sources ─prepare─► files + formats ─encode─► rows on disk (cached) ─overlong─► samples
        ─mix─► rows of an epoch ─split─► training | validation ─pack─► PackedDataset
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.config import recipe
from xtuner.config.schema import Settings
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.packing import order
from xtuner.data.packing.mix import mixed_rows, split_validation
from xtuner.data.packing.order import Ints
from xtuner.data.packing.overlong import fit, policy_of
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.packing.plan_cache import planned
from xtuner.data.packing.samples import SampleTable, samples_of
from xtuner.data.report.account import (
    EncodedSource,
    LengthLimit,
    duplicate_notes,
    num_duplicates,
    refuse_unusable,
)
from xtuner.data.report.data_report import DataReport, PartReport
from xtuner.data.sources.resolve import prepare
from xtuner.data.tokenize.encode import Encoding
from xtuner.errors import DataError, count
from xtuner.templates.base import Template
from xtuner.types import Algorithm


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
        train, validation: The packs.
        report: The report on all rows.
        pack_length: Tokens of a pack of the training data.
        repetitions: How often an epoch reads each different training row, on average.
    """

    train: PackedDataset
    validation: PackedDataset | None
    report: DataReport
    pack_length: int
    repetitions: float

    def with_validation(self, held_out: TrainingData, *, report_dir: Path | None) -> TrainingData:
        """These data, with the training part of `held_out` for validation."""
        sources = tuple(replace(s, name=f"{s.name} (validation)") for s in held_out.report.sources)
        report = replace(
            self.report,
            sources=(*self.report.sources, *sources),
            validation=held_out.report.train,
            notes=(*self.report.notes, *held_out.report.notes),
        )
        if report_dir is not None:
            report.write(report_dir)
        return replace(self, validation=held_out.train, report=report)


def build(
    settings: Settings,
    *,
    template: Template,
    tokenizer: Any,
    folder: Path,
    algorithm: Algorithm,
    image_layout: ImageLayout | None,
    vocab_size: int | None = None,
    report_dir: Path | None = None,
    quiet: bool = False,
) -> TrainingData:
    """Build the data of a run.

    Args:
        settings: The data settings and `seed` are used.
        template, tokenizer, algorithm, image_layout, vocab_size: See `Encoder`.
        folder: Where relative paths are looked up first, the folder of the settings file.
        report_dir: Folder for data_report.json; None writes none.
        quiet: Show no progress.

    Raises:
        DataError: A source cannot be read, or has no usable row.
        ConfigError: Unknown format.
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
        vocab_size=vocab_size,
    )
    stores = [encoding.store(source) for source in sources]
    policy, limit = policy_of(settings, algorithm), length_limit(settings, image_layout)
    encoded = []
    for number, (source, store) in enumerate(zip(sources, stores, strict=True)):
        fitted = fit(store, source=number, max_length=limit.tokens, policy=policy)
        encoded.append(EncodedSource(source, store, fitted, limit, policy))
    refuse_unusable(encoded)
    data = _Assembly(settings, encoded, limit, algorithm.sequences_per_row).data()
    if report_dir is not None:
        data.report.write(report_dir)
    return data


def length_limit(settings: Settings, image_layout: ImageLayout | None) -> LengthLimit:
    """The maximum length of a sample."""
    return LengthLimit(
        settings.max_length, image_layout.processor.max_tokens if image_layout else 0
    )


class _Assembly:
    """Mixes, splits and packs the usable rows, which are numbered across all sources."""

    def __init__(
        self,
        settings: Settings,
        encoded: Sequence[EncodedSource],
        limit: LengthLimit,
        sequences_per_row: int,
    ) -> None:
        self._settings, self._max_length = settings, limit.tokens
        self._capacity = limit.tokens * sequences_per_row  # of a row, and of a pack
        self._encoded = encoded
        self._samples = SampleTable.joined([each.fitted.samples for each in encoded])
        self._starts = self._samples.row_starts()
        self._source_of_row = self._samples.source[self._starts[:-1]]

    def data(self) -> TrainingData:
        """Mix, split, pack and report."""
        train_rows, validation_rows = self._split_rows()
        length = self._pack_length(train_rows)
        train = self._packed(train_rows, length)
        validation = self._packed(validation_rows, self._capacity) if len(validation_rows) else None
        hashes = self._hashes()
        report = self._report(train, validation, hashes, train_rows, validation_rows, length)
        distinct = len(train_rows) - num_duplicates(hashes[train_rows])
        return TrainingData(train, validation, report, length, len(train_rows) / distinct)

    def _pack_length(self, rows: Ints) -> int:
        lengths = self._samples.take(samples_of(rows, self._starts)).length
        return recipe.pack_length(self._settings, lengths=lengths.tolist(), limit=self._capacity)

    def _split_rows(self) -> tuple[Ints, Ints]:
        s = self._settings
        rows = mixed_rows(
            self._rows_per_source(np.arange(len(self._source_of_row))),
            repeats=s.data_repeats,
            weights=s.data_weights,
            limit=s.max_dataset_length,
            seed=s.seed,
        )
        train, validation = split_validation(rows, ratio=s.validation_ratio, seed=s.seed)
        if not len(train):
            raise DataError(
                f"no rows left to train on: the mix has {count(len(np.unique(rows)), 'row')} and "
                f"validation_ratio is {s.validation_ratio}; add data, or change the mix"
            )
        return train, validation

    def _rows_per_source(self, rows: Ints) -> list[int]:
        counts: list[int] = np.bincount(
            self._source_of_row[rows], minlength=len(self._encoded)
        ).tolist()
        return counts

    def _packed(self, rows: Ints, length: int) -> PackedDataset:
        """Pack the samples of `rows`, or put each in a pack of its own."""
        s = self._settings
        samples = self._samples.take(samples_of(rows, self._starts))
        numbers = np.arange(len(samples), dtype=np.int64)
        members, starts = numbers, np.arange(len(samples) + 1, dtype=np.int64)
        if s.packs:
            shuffled = order.permutation(len(samples), "pack", s.seed) if s.shuffle else numbers
            members, starts = self._packed_by_modality(samples, shuffled, length)
        stores = [each.store for each in self._encoded]
        return PackedDataset(
            stores, samples=samples.take(members), starts=starts, max_length=self._max_length
        )

    def _packed_by_modality(
        self, samples: SampleTable, shuffled: Ints, length: int
    ) -> tuple[Ints, Ints]:
        """Pack samples in order; with group_by_modality, those with and without images
        separately."""
        s = self._settings
        if not (s.shuffle and s.group_by_modality):
            return planned(samples.length, length, order=shuffled)
        has_images = samples.has_images([each.store for each in self._encoded])[shuffled]
        if has_images.all() or not has_images.any():
            return planned(samples.length, length, order=shuffled)
        parts = [
            planned(samples.length, length, order=shuffled[has_images == modality])
            for modality in (True, False)
        ]
        (first, first_starts), (second, second_starts) = parts
        starts = np.concatenate([first_starts, second_starts[1:] + len(first)])
        return np.concatenate([first, second]), starts

    def _report(
        self,
        train: PackedDataset,
        validation: PackedDataset | None,
        hashes: Any,
        train_rows: Ints,
        validation_rows: Ints,
        length: int,
    ) -> DataReport:
        s = self._settings
        train_rows = np.flatnonzero(np.bincount(train_rows))  # unique
        used = self._rows_per_source(np.concatenate([train_rows, validation_rows]))
        train_hashes, validation_hashes = hashes[train_rows], hashes[validation_rows]
        return DataReport(
            sources=tuple(
                each.report(rows_used=count)
                for each, count in zip(self._encoded, used, strict=True)
            ),
            train=PartReport.of(train, length),
            validation=None if validation is None else PartReport.of(validation, self._capacity),
            max_length=self._capacity,
            packed=s.packs,
            duplicates=num_duplicates(train_hashes, validation_hashes),
            notes=(
                *(note for each in self._encoded for note in each.source.notes),
                *duplicate_notes(train_hashes, validation_hashes),
                *self._notes_on_weights(),
                *self._notes_on_images(train),
            ),
        )

    def _notes_on_weights(self) -> list[str]:
        """How many rows have loss weights."""
        weighted = sum(each.store.num_weighted for each in self._encoded)
        note = (
            f"{count(weighted, 'row')} with loss weights: the loss is a weighted mean over tokens"
        )
        return [note] if weighted else []

    def _notes_on_images(self, train: PackedDataset) -> list[str]:
        """A note if no row has images; an error if training requires images."""
        s = self._settings
        if not s.has_vision or train.any_images:
            return []
        if s.llm_training == "frozen":
            raise DataError(
                "no row has an image and the language model is frozen, so there is nothing to "
                "train. Add rows with images, or train the language model (tuning = 'qlora')"
            )
        return ["no row has an image, so projector and vision tower are not trained"]

    def _hashes(self) -> Any:
        """The hash of each usable row."""
        rows = self._samples.row[self._starts[:-1]]
        return np.concatenate(
            [
                each.store.hashes[rows[self._source_of_row == number]]
                for number, each in enumerate(self._encoded)
            ]
        )
