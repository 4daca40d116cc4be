"""Pictures in a conversation: prompts with places for patches, and what stands there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from xtuner.data.images.files import open_picture
from xtuner.errors import DataError, ModelError
from xtuner.models.vision.load import Seeing
from xtuner.types import IMAGE, Message, Pictures


class Vision:
    """Shows pictures to a model.

    Args:
        seeing: the model's eyes.
        keep_features: the encoder looks at a picture once, and not again with every question of a
            conversation; not for a model in training, whose encoder changes.
    """

    def __init__(self, seeing: Seeing, *, keep_features: bool = False) -> None:
        self._seeing = seeing
        self._keeps_features = keep_features
        self._pixels: dict[str, torch.Tensor] = {}
        self._features: dict[str, torch.Tensor] = {}

    def widened(self, ids: Sequence[int]) -> list[int]:
        """`ids` with each ``<image>`` made as long as a picture."""
        token, times = self._seeing.image_token_id, self._seeing.tokens_each
        return [i for i in ids for _ in range(times if i == token else 1)]

    def inputs(self, ids: Sequence[int], messages: Sequence[Message]) -> dict[str, Any]:
        """The model's inputs for the prompt of widened `ids`; empty where it has no picture.

        Raises:
            DataError: a picture cannot be opened, or a place has none.
        """
        names = [name for message in messages for name in message.images]
        if not names:
            if self._seeing.image_token_id in ids:
                raise DataError(f"the conversation has {IMAGE} in its text and no picture")
            return {}
        model = self._seeing.eyes.llava
        device = model.get_input_embeddings().weight.device
        tokens = torch.tensor([list(ids)], device=device)
        places = tokens == self._seeing.image_token_id
        if int(places.sum()) != len(names) * self._seeing.tokens_each:
            raise ModelError(
                f"the template shows {int(places.sum()) // self._seeing.tokens_each} of "
                f"{len(names)} pictures to the model; name another with --prompt-template"
            )
        with torch.no_grad():
            pictures = Pictures(
                pixel_values=torch.empty(0),
                places=places,
                counts=(len(names),),
                features=tuple(self._seen(name, device) for name in names),
            )
            return {"inputs_embeds": self._seeing.eyes.embed(tokens, pictures)}

    def check(self, names: Sequence[str]) -> None:
        """Open pictures that will be shown.

        Raises:
            DataError: one of them cannot be opened.
        """
        for name in names:
            self._picture(name)

    def _seen(self, name: str, device: torch.device) -> torch.Tensor:
        """The features of one picture."""
        if (found := self._features.get(name)) is None:
            (found,) = self._seeing.eyes.features(self._picture(name)[None].to(device))
            if self._keeps_features:
                self._features[name] = found
        return found

    def _picture(self, name: str) -> torch.Tensor:
        if name not in self._pixels:
            self._pixels[name] = torch.from_numpy(self._seeing.pixels(open_picture(name)))
        return self._pixels[name]


def question(text: str, images: Sequence[str] = ()) -> Message:
    """The user's turn about `images`, which stand before the text unless it says where.

    Raises:
        DataError: the text has places for another number of pictures.
    """
    places = text.count(IMAGE)
    if places not in (0, len(images)) or (places and not images):
        raise DataError(
            f"the question has {places} times {IMAGE} for {len(images)} pictures: write it once "
            "for each, or leave it out and the pictures stand first"
        )
    before = "" if places else f"{IMAGE}\n" * len(images)
    return Message("user", before + text, images=tuple(images))


def without_places(text: str) -> str:
    """`text` of an answer with each ``<image>`` in it made plain words: no picture stands there."""
    return text.replace(IMAGE, IMAGE.replace("<", "< "))
