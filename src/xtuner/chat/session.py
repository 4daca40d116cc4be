"""A conversation with a model: the history grows with every question and answer."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.errors import DataError, ModelError
from xtuner.generation.generate import GenerationOptions, context_length, stream
from xtuner.generation.images import ImageInput, question, without_image_tokens
from xtuner.templates.base import Template
from xtuner.tools import loop
from xtuner.tools.toolbox import ToolBox
from xtuner.types import IMAGE, Message

logger = logging.getLogger("xtuner.chat")


@dataclass(frozen=True)
class ToolUse:
    """The tools of a conversation.

    Attributes:
        box: The tools, which run the calls.
        allow: Called before each call; returns whether it may run.
        max_rounds: Maximum number of answers with calls per question.
    """

    box: ToolBox
    allow: Callable[[Mapping[str, Any]], bool] = lambda call: True
    max_rounds: int = 8


class Session:
    """A conversation with `model`, rendered by the same template object as in training.

    Args:
        model, tokenizer, template, options, vision: Arguments of `generation.generate.stream`.
        generate: Generates an answer in pieces; called instead of `stream`, with its arguments.

    Attributes:
        messages: The conversation so far; the template adds the system message.
        tools: The tools that the model may call, if any.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        template: Template,
        options: GenerationOptions,
        vision: ImageInput | None = None,
        tools: ToolUse | None = None,
        generate: Callable[..., Generator[str, None, None]] = stream,
    ) -> None:
        self.tools = tools
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
            ModelError: The question alone exceeds the model's context.
            DataError: The template cannot render the question, or an image cannot be read.
        """
        messages = self._fit([*self.messages, self._asked(text, images)])
        answer = self._answer(messages)
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
                self.messages = [*messages, self.template.answer(text)]

    def act(self, text: str, images: Sequence[str] = ()) -> Generator[loop.Event, None, None]:
        """Answer `text` and `images` with calls of `tools`; yield events.

        Question, calls, results and answer are added to the history. If the caller stops, completed
        messages are kept; a question that fails is not.

        Raises:
            ModelError: The model's call format is unknown, or the question alone exceeds its
            context.
            DataError: The template cannot render the question, or an image cannot be read.
        """
        if self.tools is None:
            with contextlib.closing(self.ask(text, images)) as pieces:
                yield from map(loop.Text, pieces)
            return
        family = self.template.tool_family
        if family is None:
            raise ModelError(
                f"how this model writes tool calls with the template '{self.template.name}' is not "
                "known; use a named template, such as chatml (--prompt-template chatml)"
            )
        messages = self._fit([*self.messages, self._asked(text, images)])
        new: list[Message] = []
        steps = loop.converse(
            lambda conversation: self._answer(self._fit(list(conversation))),
            messages,
            tools=self.tools.box,
            family=family,
            allow=self.tools.allow,
            max_rounds=self.tools.max_rounds,
            new=new,
            turn_of=self.template.answer,
        )
        spoken, keep = "", True
        try:
            with contextlib.closing(steps):
                for event in steps:
                    spoken = spoken + event.text if isinstance(event, loop.Text) else ""
                    yield event
        except (GeneratorExit, KeyboardInterrupt):
            keep = bool(new or spoken)
            raise
        except BaseException:
            keep = False
            raise
        finally:
            if keep:
                rest = [self.template.answer(spoken)] if spoken and _unanswered(new) else []
                self.messages = [*messages, *_complete(new), *rest]

    def _asked(self, text: str, images: Sequence[str]) -> Message:
        if images and self.vision is None:
            raise DataError("this model does not take images; use a LLaVA model")
        return question(text, images) if self.vision else Message("user", text)

    def _answer(self, messages: Sequence[Message]) -> Generator[str, None, None]:
        return self._generate(
            self.model,
            self.tokenizer,
            template=self.template,
            messages=messages,
            options=self.options,
            tools=self._schemas,
            vision=self.vision,
        )

    @property
    def _schemas(self) -> Sequence[Mapping[str, Any]]:
        return self.tools.box.schemas if self.tools else ()

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
        ids = self.template.prompt_ids(messages, tools=self._schemas)
        return len(self.vision.expanded(ids, messages) if self.vision else ids)


def _unanswered(messages: Sequence[Message]) -> bool:
    """Whether the last message is not an answer of the assistant."""
    return not messages or messages[-1].role != "assistant" or bool(messages[-1].tool_calls)


def _complete(messages: Sequence[Message]) -> list[Message]:
    """The messages without calls at the end that have no result."""
    called = [i for i, message in enumerate(messages) if message.tool_calls]
    if called and len(messages) - called[-1] - 1 < len(messages[called[-1]].tool_calls):
        return list(messages[: called[-1]])
    return list(messages)
