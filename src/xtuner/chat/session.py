"""A conversation with a model: the history grows with every question and answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

from xtuner.errors import DataError
from xtuner.generation.generate import GenerationOptions, context_length, stream
from xtuner.generation.images import ImageInput, question, without_image_tokens
from xtuner.templates.base import Template
from xtuner.types import IMAGE, Message

logger = logging.getLogger("xtuner.chat")


class Session:
    """A conversation with `model`, rendered by the same template object as in training.

    Args:
        model, tokenizer, template, options, vision: arguments of `generation.generate.stream`.
        generate: gives the pieces of an answer in place of `stream`, with its arguments.

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
        generate: Callable[..., Generator[str, None, None]] = stream,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.template, self.options = template, options
        self.vision, self._generate = vision, generate
        if vision and IMAGE in template.system:
            raise DataError(f"the system message contains {IMAGE}; attach images to questions")
        self.messages: list[Message] = []

    def ask(self, text: str, images: Sequence[str] = ()) -> Generator[str, None, None]:
        """Yield the answer to `text` and `images` piece by piece.

        Question and answer are added to the history when the answer ends or the caller stops it; a
        question that fails is not. When the conversation exceeds the model's context, its oldest
        turns are dropped, with a warning.

        Raises:
            ModelError: the question alone exceeds the model's context.
            DataError: the template cannot render the question, or an image cannot be read.
        """
        asked = question(text, images) if self.vision else Message("user", text)
        if images and self.vision is None:
            raise DataError("this model does not take images; use a LLaVA model")
        messages = self._fit([*self.messages, asked])
        answer = self._generate(
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
            with contextlib.closing(answer):  # restores the model as soon as the answer stops
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
                text = "".join(pieces)
                text = without_image_tokens(text) if self.vision else text
                self.messages = [*messages, Message("assistant", text)]

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = []

    def _fit(self, messages: list[Message]) -> list[Message]:
        """Drop the oldest turns until the context has room for the answer."""
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
                "the conversation exceeds the model's context of %s tokens; its oldest %s dropped",
                limit,
                "turn is" if dropped == 1 else f"{dropped} turns are",
            )
        return messages

    def _length(self, messages: list[Message]) -> int:
        ids = self.template.prompt_ids(messages)
        return len(self.vision.expanded(ids, messages) if self.vision else ids)
