"""Images in a conversation: expand image tokens and embed the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xtuner.data.images.files import open_image
from xtuner.errors import DataError, ModelError
from xtuner.models.vision.load import ImageModel
from xtuner.types import IMAGE, BatchImages, Message


class ImageInput:
    """Embeds the images of messages for a model with image input.

    Args:
        image_model: the image model.
        keep_features: encode each image once per conversation instead of once per question; not for
            a model in training, whose vision tower may change.
    """

    def __init__(self, image_model: ImageModel, *, keep_features: bool = False) -> None:
        self._image_model = image_model
        self._keeps_features = keep_features
        self._pixels: dict[str, torch.Tensor] = {}
        self._features: dict[str, torch.Tensor] = {}

    def expanded(self, ids: Sequence[int]) -> list[int]:
        """`ids` with each ``<image>`` token repeated once per image token."""
        token, times = self._image_model.image_token_id, self._image_model.tokens_each
        return [i for i in ids for _ in range(times if i == token else 1)]

    def inputs(self, ids: Sequence[int], messages: Sequence[Message]) -> dict[str, Any]:
        """The model inputs for expanded prompt `ids`; empty if there is no image.

        Raises:
            DataError: an image cannot be opened, or ``<image>`` has no image.
            ModelError: the template drops images of the conversation.
        """
        names = [name for message in messages for name in message.images]
        if not names:
            if self._image_model.image_token_id in ids:
                raise DataError(f"the conversation contains {IMAGE} but no image")
            return {}
        model = self._image_model.embedder.llava
        device = model.get_input_embeddings().weight.device
        tokens = torch.tensor([list(ids)], device=device)
        mask = tokens == self._image_model.image_token_id
        if int(mask.sum()) != len(names) * self._image_model.tokens_each:
            raise ModelError(
                f"the template passes {int(mask.sum()) // self._image_model.tokens_each} of "
                f"{len(names)} images to the model; choose another with --prompt-template"
            )
        with torch.no_grad():
            images = BatchImages(
                pixel_values=torch.empty(0),
                token_mask=mask,
                counts=(len(names),),
                features=tuple(self._features_of(name, device) for name in names),
            )
            return {"inputs_embeds": self._image_model.embedder.embed(tokens, images)}

    def check(self, names: Sequence[str]) -> None:
        """Check that images can be opened.

        Raises:
            DataError: an image cannot be opened.
        """
        for name in names:
            self._image(name)

    def _features_of(self, name: str, device: torch.device) -> torch.Tensor:
        """The features of one image."""
        if (found := self._features.get(name)) is None:
            (found,) = self._image_model.embedder.features(self._image(name)[None].to(device))
            if self._keeps_features:
                self._features[name] = found
        return found

    def _image(self, name: str) -> torch.Tensor:
        if name not in self._pixels:
            self._pixels[name] = torch.from_numpy(self._image_model.pixels(open_image(name)))
        return self._pixels[name]


def question(text: str, images: Sequence[str] = ()) -> Message:
    """The user's message about `images`, which come before the text unless it contains ``<image>``.

    Raises:
        DataError: the text contains ``<image>`` for another number of images.
    """
    count = text.count(IMAGE)
    if count not in (0, len(images)) or (count and not images):
        raise DataError(
            f"the question contains {IMAGE} {count} times for {len(images)} images: write it once "
            "per image, or leave it out to put the images first"
        )
    before = "" if count else f"{IMAGE}\n" * len(images)
    return Message("user", before + text, images=tuple(images))


def without_image_tokens(text: str) -> str:
    """`text` with each ``<image>`` changed so that it is not taken for an image."""
    return text.replace(IMAGE, IMAGE.replace("<", "< "))
