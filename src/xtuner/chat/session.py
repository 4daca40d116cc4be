"""A conversation with a model: the history grows with every question and answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from typing import Any

from xtuner.errors import DataError
from xtuner.generation.generate import GenerationOptions, context_length, stream
from xtuner.generation.images import ImageInput, question, without_image_tokens
from xtuner.templates.base import Template
from xtuner.types import IMAGE, Message

logger = logging.getLogger("xtuner.chat")


class Session:
    """Asks `model` with the same template object that training uses.

    Attributes:
        messages: the conversation so far; the template adds the system message.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: Template,
        options: GenerationOptions,
        vision: ImageInput | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template, self.options = template, options
        self.vision = vision
        if vision and IMAGE in template.system:
            raise DataError(f"the system message has {IMAGE} in it: images belong to questions")
        self.messages: list[Message] = []

    def ask(self, text: str, images: Sequence[str] = ()) -> Generator[str, None, None]:
        """Yield the answer to `text`, which may be about images, piece by piece.

        Question and answer enter the history when the answer ends or the caller stops it; a
        question that fails does not. When the conversation outgrows the model's context, its oldest
        questions are left out, with a warning.

        Raises:
            ModelError: the question alone is longer than the model's context.
            DataError: the template has no place for it, or an image cannot be shown.
        """
        asked = question(text, images) if self.vision else Message("user", text)
        if images and self.vision is None:
            raise DataError("this model has no eyes: images need a LLaVA model")
        messages = self._fitting([*self.messages, asked])
        answer = stream(
            self.model,
            self.tokenizer,
            template=self.template,
            messages=messages,
            options=self.options,
            vision=self.vision,
        )
        pieces: list[str] = []
        keep = True
        try:
            with contextlib.closing(answer):  # so that a stop sets the model back at once
                for piece in answer:
                    pieces.append(piece)
                    yield piece
        except (GeneratorExit, KeyboardInterrupt):
            keep = bool(pieces)
            raise
        except BaseException:
            keep = False
            raise
        finally:
            if keep:
                said = "".join(pieces)
                said = without_image_tokens(said) if self.vision else said
                self.messages = [*messages, Message("assistant", said)]

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def _fitting(self, messages: list[Message]) -> list[Message]:
        """`messages` without the oldest questions that leave no room for the answer."""
        limit = context_length(self.model)
        reserved = min(self.options.max_new_tokens, limit // 4)
        dropped = 0
        while self._length(messages) + reserved > limit:
            later = [i for i, m in enumerate(messages) if m.role == "user" and i > 0]
            if not later:
                break
            messages = messages[later[0] :]
            dropped += 1
        if dropped:
            logger.warning(
                "the conversation outgrew the model's %s tokens: its oldest %s left out",
                limit,
                "question is" if dropped == 1 else f"{dropped} questions are",
            )
        return messages

    def _length(self, messages: list[Message]) -> int:
        ids = self.template.prompt_ids(messages)
        return len(self.vision.expanded(ids, messages) if self.vision else ids)
