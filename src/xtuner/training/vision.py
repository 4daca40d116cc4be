"""The parts of a run with image input; `xtuner.training.run` connects them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.data.images.expansion import ImageCollate, ImageLayout, open_image_folder
from xtuner.data.images.feature_store import FeatureStore
from xtuner.data.images.url import fetched, image_path, is_url
from xtuner.data.loader import Collate
from xtuner.errors import ModelError, shell_command
from xtuner.generation.images import ImageInput, question
from xtuner.hub.old_pth import is_old
from xtuner.models.vision.folder import other_parts, projectors_beside
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.load import VisionLanguageModel
from xtuner.models.vision.tower import add_image_token, check_layer, identity_of, vision_config
from xtuner.models.vision.training import LlavaTraining, make
from xtuner.types import Algorithm, Message


def image_layout_of(settings: Settings, tokenizer: Any, *, folder: Path) -> ImageLayout | None:
    """How images are expanded to tokens; None for a run without image input.

    Args:
        tokenizer: Gets the token ``<image>`` if the model takes images.
        folder: The folder of the settings file.

    Raises:
        ModelError: The vision tower does not exist, or its configuration cannot be used.
        DataError: The folder of the images does not exist.
    """
    return _image_layout(settings, tokenizer, folder) if settings.has_vision else None


def _image_layout(settings: Settings, tokenizer: Any, folder: Path) -> ImageLayout:
    images = open_image_folder(settings.image_folder, data_root=settings.data_root, folder=folder)
    return ImageLayout(images, add_image_token(tokenizer), _processor(settings))


def _processor(settings: Settings) -> LlavaImageProcessor:
    return LlavaImageProcessor.of_tower(
        settings.visual_encoder_name_or_path or "", pad_to_square=settings.pad_image_to_square
    )


@dataclass
class RunVision:
    """The image input of a run.

    Attributes:
        settings: The run's settings.
        folder: The folder of the settings file.
        image_layout: How images are expanded to tokens, for the data.
        features: The feature cache; None if features are computed each time.
        parts: The model, after `join`.
        image_input: Adds images to the model's sample answers, after `join`.
        left_out: Parts in `pretrained_pth` that are not read, after `join`.
    """

    settings: Settings
    folder: Path
    image_layout: ImageLayout
    features: FeatureStore | None = None
    parts: LlavaTraining = field(init=False)
    image_input: ImageInput = field(init=False)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, settings: Settings, tokenizer: Any, *, folder: Path) -> RunVision:
        """Read the vision tower's configuration; `tokenizer` gets the token ``<image>``.

        Raises:
            ModelError: The vision tower does not exist, or its configuration cannot be used.
            DataError: The folder of the images does not exist, or an image cannot be fetched.
        """
        name = settings.visual_encoder_name_or_path or ""
        for image in filter(is_url, settings.evaluation_images):
            fetched(image)  # fail before the data are built
        image_layout = _image_layout(settings, tokenizer, folder)
        check_layer(
            settings.visual_select_layer,
            layers=vision_config(name).num_hidden_layers,
            adapters=settings.visual_encoder_training == "adapter",
        )
        features = FeatureStore() if settings.cache_visual_features else None
        return cls(settings, folder, image_layout, features)

    @property
    def encoder(self) -> str:
        """The name of the vision tower in checkpoints."""
        name = self.settings.visual_encoder_name_or_path or ""
        return str(Path(name).resolve()) if Path(name).is_dir() else name

    def collate(self, algorithm: Algorithm) -> Collate:
        """Batches with pixels."""
        kept = self.features.read if self.features else None
        return ImageCollate(algorithm.collate, self.image_layout, kept)

    def join(self, llm: Any, *, dtype: torch.dtype, device: str, source: Path | None) -> Any:
        """Connect the vision tower and the projector to `llm`; see `training.make`.

        Raises:
            ModelError: They do not fit together.
            DataError: An image of evaluation_images cannot be opened.
        """
        projector = None if source else self._projector()
        self.left_out = other_parts(projector) if projector else []
        self.parts = make(
            self.settings,
            llm,
            image_token_id=self.image_layout.token_id,
            dtype=dtype,
            device=device,
            source=source,
            projector=projector,
            keep=self.features.write if self.features else None,
        )
        if self.features:
            encoder, processor = self.parts.encoder, self.parts.processor
            self.features.open(
                {
                    "encoder": identity_of(encoder),
                    "layer": self.settings.visual_select_layer,
                    "processor": processor.upstream.to_dict(),
                },
                shape=(processor.max_tokens, encoder.config.hidden_size),
            )
        layout, embedder = self.image_layout, self.parts.embedder
        self.image_input = ImageInput(
            VisionLanguageModel(self.parts.llava, embedder, layout.processor, layout.token_id)
        )
        self.image_input.check([self._image(name) for name in self.settings.evaluation_images])
        return self.parts.packed

    def recompute(self) -> None:
        """Recompute the vision tower's activations in the backward pass, too."""
        tower = self.parts.llava.model.vision_tower
        tower.gradient_checkpointing_enable({"use_reentrant": False})

    def question(self, text: str, images: Sequence[str]) -> Message:
        """Prepare a question with its images, both from the settings."""
        return question(text, [self._image(name) for name in images])

    def save(self, folder: Path, trained: Mapping[str, Tensor]) -> None:
        """Write the trained parts; `trained` holds their weights by name in the full model."""
        self.parts.save(folder, trained)

    def line(self) -> str:
        """The tokens that an image takes, for the terminal."""
        s, tokens = self.settings, self.image_layout.processor.max_tokens
        return (
            f"Images       {s.visual_encoder_name_or_path}: {tokens} tokens each, in addition to "
            f"max_length: {s.max_length + tokens:,} in all"
        )

    def trained(self) -> Iterator[str]:
        """What is trained of each part, for the terminal; after `join`."""
        if self.left_out:
            name = str(self.settings.pretrained_pth)
            resume = f"; to start from all of them: {shell_command('--resume', name)}"
            resume = resume if is_old(Path(name)) else ""
            yield (
                f"Note: {name} also holds weights of {', '.join(self.left_out)}; pretrained_pth "
                f"takes its projector only{resume}"
            )
        for number, line in enumerate(self.parts.table()):
            yield f"{'' if number else 'Trained':13}{line}"

    def _image(self, name: str) -> str:
        folders = (self.folder, self.image_layout.folder.root)
        return image_path(name, data_root=self.settings.data_root, folders=folders)

    def _projector(self) -> Path | None:
        name = self.settings.pretrained_pth
        if name is None:
            return None
        for path in (self.folder / Path(name).expanduser(), Path(name).expanduser()):
            if path.exists() or (path.suffix == ".pth" and path.with_suffix("").is_dir()):
                return path
        others = ", ".join(map(repr, projectors_beside(Path(name).expanduser())))
        hint = f"; these have a projector: {others}" if others else ""
        raise ModelError(f"pretrained_pth = {name!r}: no such folder{hint}")
