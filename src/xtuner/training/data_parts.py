"""The parts that read the data of a run, shared by training and the commands that show or check
data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner import algorithms, templates
from xtuner.algorithms.base import BaseAlgorithm
from xtuner.config.load import LoadedSettings
from xtuner.config.schema import Settings
from xtuner.data.build import TrainingData, build
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.loader import Collate, Loader
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.sources.resolve import of_validation
from xtuner.data.tokenize.cache import cache_root
from xtuner.models.can_pack import resolve_packing
from xtuner.models.facts import facts_of
from xtuner.models.load import load_tokenizer
from xtuner.parallel.once import Once
from xtuner.parallel.processes import Processes
from xtuner.templates.base import Template
from xtuner.training.preflight import check_tokenizer
from xtuner.training.vision import image_layout_of


@dataclass(frozen=True)
class DataParts:
    """The parts, created in the order of their dependencies.

    Attributes:
        settings: The run's settings, with `pack_to_max_length` resolved.
        folder: The folder of the settings file.
        tokenizer: The model's tokenizer, with the token ``<image>`` if the model takes images.
        algorithm: Determines which records are accepted and how they become sequences.
        template: Renders conversations.
        image_layout: How images are expanded to tokens; None if the model takes no images.
        packing: A line to show if the model does not support packing.
        vocab_size: Number of embeddings of the model, if the tokenizer has tokens beyond them.
    """

    settings: Settings
    folder: Path
    tokenizer: Any
    algorithm: BaseAlgorithm
    template: Template
    image_layout: ImageLayout | None
    packing: str | None
    vocab_size: int | None = None

    @classmethod
    def open(cls, loaded: LoadedSettings) -> DataParts:
        """Create the parts.

        Raises:
            XTunerError: The tokenizer, template, algorithm or vision tower cannot be used.
        """
        folder = loaded.folder
        settings, packing = resolve_packing(loaded.settings)
        algorithm = algorithms.of_run(settings, folder=folder)
        tokenizer = load_tokenizer(
            settings.pretrained_model_name_or_path, trust_remote_code=settings.trust_remote_code
        )
        template = templates.of_run(settings, tokenizer, algorithm=algorithm, folder=folder)
        vocab_size = None
        if not settings.resize_embeddings:
            vocab_size = check_tokenizer(tokenizer, template, facts_of(settings))
        image_layout = image_layout_of(settings, tokenizer, folder=folder)
        if image_layout is not None:  # the token <image> may change the template's output
            template = templates.of_run(settings, tokenizer, algorithm=algorithm, folder=folder)
        return cls(
            settings, folder, tokenizer, algorithm, template, image_layout, packing, vocab_size
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `data.build.build` and `data.report.check.bad_rows`."""
        names = ("template", "tokenizer", "folder", "algorithm", "image_layout", "vocab_size")
        return {name: getattr(self, name) for name in names}

    def build(self, *, report_dir: Path | None = None, quiet: bool = False) -> TrainingData:
        """The packs of the training data and of `validation_path`; see `data.build.build`."""
        data = build(self.settings, **self.arguments, report_dir=report_dir, quiet=quiet)
        if (validation := of_validation(self.settings)) is None:
            return data
        held_out = build(validation, **self.arguments, quiet=quiet)
        return data.with_validation(held_out, report_dir=report_dir)

    def build_once(
        self, processes: Processes, *, report_dir: Path | None
    ) -> tuple[TrainingData, str]:
        """The packs, encoded by one process; the others then read them from the cache.

        Returns:
            The packs, and on several nodes where they were encoded.
        """
        once = Once(processes, cache_root())
        data = once.run(lambda: self.build(report_dir=report_dir, quiet=not processes.is_main))
        return data, once.note

    def loader(self, dataset: PackedDataset, *, collate: Collate, processes: Processes) -> Loader:
        """Returns the loader of this process's share of `dataset`."""
        s = self.settings
        assert s.accumulative_counts != "auto", "see config.recipe"
        return Loader(
            dataset,
            collate=collate,
            batch_size=s.batch_size,
            accumulative_counts=s.accumulative_counts,
            seed=s.seed,
            shuffle=s.shuffle,
            rank=processes.data_rank,
            world_size=processes.data_world_size,
            num_workers=s.dataloader_num_workers,
            pin_memory=processes.device.type == "cuda",
            grouped=s.has_vision and s.group_by_modality and s.shuffle,
        )
