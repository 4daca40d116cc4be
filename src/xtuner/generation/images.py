"""Images in a conversation: prompts with the tokens of images, and their input embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtuner.data.images.expansion import expand
from xtuner.data.images.files import open_image
from xtuner.errors import DataError, ModelError, count
from xtuner.models.vision.load import VisionLanguageModel
from xtuner.types import IGNORE_INDEX, IMAGE, Batch, BatchImages, Message


class _Image(NamedTuple):
    """An image as shown: its size in pixels (width, height), and its values ``[3, H, W]``."""

    size: tuple[int, int]
    pixels: Tensor


class ImageInput:
    """Passes the images of messages to a model.

    Args:
        model: A model with image input.
        keep_features: Compute the features of an image once, not again with every question of a
            conversation; not for a model in training, whose vision tower changes.
    """

    def __init__(self, model: VisionLanguageModel, *, keep_features: bool = False) -> None:
        self.model = model
        self._keeps_features = keep_features
        self._images: dict[str, _Image] = {}
        self._features: dict[str, Tensor] = {}

    def expanded(self, ids: Sequence[int], messages: Sequence[Message]) -> list[int]:
        """`ids` of the prompt for `messages` with each ``<image>`` repeated for its image.

        Raises:
            DataError: An image cannot be opened, or ``<image>`` stands for none.
            ModelError: The template leaves images out.
        """
        names, found = _names(messages), ids.count(self.model.image_token_id)
        if found and not names:
            raise DataError(f"the text of the conversation contains {IMAGE}, but there is no image")
        if found != len(names):
            raise ModelError(
                f"the template shows only {found} of {len(names)} images to the model; select "
                "another with --prompt-template"
            )
        counts = [self.model.processor.num_tokens(self._image(name).size) for name in names]
        return expand(ids, self.model.image_token_id, counts)[0]

    def inputs(self, ids: Sequence[int], messages: Sequence[Message]) -> dict[str, Any]:
        """The model's inputs for the prompt of expanded `ids`; empty where it has no image.

        Raises:
            DataError: An image cannot be opened.
        """
        names = _names(messages)
        if not names:
            return {}
        device = self.model.model.get_input_embeddings().weight.device
        input_ids = torch.tensor([list(ids)], device=device)
        with torch.no_grad():
            images = BatchImages(
                pixel_values=(),  # all features are given
                mask=input_ids == self.model.image_token_id,
                sizes=tuple(self._image(name).size for name in names),
                counts=(len(names),),
                features=tuple(self._features_of(name, device) for name in names),
            )
            inputs = {"inputs_embeds": self.model.embedder.embed(input_ids, images)}
            positions = self.model.embedder.positions(_as_batch(input_ids, images))
        counted = torch.arange(len(ids), device=device)[None]
        # Consecutive positions are a language model's default, and not every model takes the
        # argument.
        return inputs if torch.equal(positions, counted) else {**inputs, "position_ids": positions}

    def check(self, names: Sequence[str]) -> None:
        """Check that images can be opened.

        Raises:
            DataError: An image cannot be opened.
        """
        for name in names:
            self._image(name)

    def _features_of(self, name: str, device: torch.device) -> Tensor:
        if (found := self._features.get(name)) is None:
            (found,) = self.model.embedder.features([self._image(name).pixels.to(device)])
            if self._keeps_features:
                self._features[name] = found
        return found

    def _image(self, name: str) -> _Image:
        if name not in self._images:
            image = open_image(name)
            pixels = torch.from_numpy(self.model.processor.preprocess(image))
            self._images[name] = _Image(image.size, pixels)
        return self._images[name]


def question(text: str, images: Sequence[str] = ()) -> Message:
    """The user's message about `images`, which come before the text unless it contains ``<image>``.

    Raises:
        DataError: The text has ``<image>`` for another number of images.
    """
    placeholders = text.count(IMAGE)
    if placeholders not in (0, len(images)) or (placeholders and not images):
        raise DataError(
            f"the question contains {IMAGE} {count(placeholders, 'time')} for "
            f"{count(len(images), 'image')}: write it once "
            "per image, or omit it, which puts the images first"
        )
    before = "" if placeholders else f"{IMAGE}\n" * len(images)
    return Message("user", before + text, images=tuple(images))


def without_image_tokens(text: str) -> str:
    """The `text` of an answer with each ``<image>`` as plain text: it refers to no image."""
    return text.replace(IMAGE, IMAGE.replace("<", "< "))


def _as_batch(input_ids: Tensor, images: BatchImages) -> Batch:
    count = input_ids.shape[1]
    return Batch(
        input_ids=input_ids,
        labels=torch.full_like(input_ids, IGNORE_INDEX),
        position_ids=torch.arange(count, device=input_ids.device)[None],
        cu_seqlens=torch.tensor([0, count], dtype=torch.int32),
        images=images,
    )


def _names(messages: Sequence[Message]) -> list[str]:
    return [name for message in messages for name in message.images]
