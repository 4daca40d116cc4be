"""Images in a conversation: prompts with places for patches, and what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xtuner.data.images.files import open_image
from xtuner.errors import DataError, ModelError
from xtuner.models.vision.load import ImageModel
from xtuner.types import IMAGE, BatchImages, Message


class ImageInput:
    """Shows images to a model.

    Args:
        seeing: the model's eyes.
        keep_features: the encoder looks at an image once, and not again with every question of a
            conversation; not for a model in training, whose encoder changes.
    """

    def __init__(self, image_model: ImageModel, *, keep_features: bool = False) -> None:
        self._image_model = image_model
        self._keeps_features = keep_features
        self._pixels: dict[str, torch.Tensor] = {}
        self._features: dict[str, torch.Tensor] = {}

    def widened(self, ids: Sequence[int]) -> list[int]:
        """`ids` with each ``<image>`` made as long as an image."""
        token, times = self._image_model.image_token_id, self._image_model.tokens_each
        return [i for i in ids for _ in range(times if i == token else 1)]

    def inputs(self, ids: Sequence[int], messages: Sequence[Message]) -> dict[str, Any]:
        """The model's inputs for the prompt of widened `ids`; empty where it has no image.

        Raises:
            DataError: an image cannot be opened, or a place has none.
        """
        names = [name for message in messages for name in message.images]
        if not names:
            if self._image_model.image_token_id in ids:
                raise DataError(f"the conversation has {IMAGE} in its text and no image")
            return {}
        model = self._image_model.embedder.llava
        device = model.get_input_embeddings().weight.device
        tokens = torch.tensor([list(ids)], device=device)
        places = tokens == self._image_model.image_token_id
        if int(places.sum()) != len(names) * self._image_model.tokens_each:
            raise ModelError(
                f"the template shows {int(places.sum()) // self._image_model.tokens_each} of "
                f"{len(names)} images to the model; name another with --prompt-template"
            )
        with torch.no_grad():
            images = BatchImages(
                pixel_values=torch.empty(0),
                token_mask=places,
                counts=(len(names),),
                features=tuple(self._seen(name, device) for name in names),
            )
            return {"inputs_embeds": self._image_model.embedder.embed(tokens, images)}

    def check(self, names: Sequence[str]) -> None:
        """Open images that will be shown.

        Raises:
            DataError: one of them cannot be opened.
        """
        for name in names:
            self._image(name)

    def _seen(self, name: str, device: torch.device) -> torch.Tensor:
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
    """The user's turn about `images`, which stand before the text unless it says where.

    Raises:
        DataError: the text has places for another number of images.
    """
    places = text.count(IMAGE)
    if places not in (0, len(images)) or (places and not images):
        raise DataError(
            f"the question has {places} times {IMAGE} for {len(images)} images: write it once "
            "for each, or leave it out and the images stand first"
        )
    before = "" if places else f"{IMAGE}\n" * len(images)
    return Message("user", before + text, images=tuple(images))


def without_places(text: str) -> str:
    """`text` of an answer with each ``<image>`` in it made plain words: no image stands there."""
    return text.replace(IMAGE, IMAGE.replace("<", "< "))
