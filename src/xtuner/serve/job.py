"""A job for the engine, the events that its client gets, and the limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from xtuner.errors import XTunerError
from xtuner.generation.answer import TokenScore
from xtuner.generation.generate import GenerationOptions
from xtuner.serve.models import ServedModel
from xtuner.types import Message


@dataclass(frozen=True)
class Limits:
    """What the engine accepts.

    Attributes:
        max_batch: Maximum number of answers generated at the same time.
        max_queue: Maximum number of waiting requests; further ones are refused.
        max_seconds: Time limit for an answer, measured from its request.
    """

    max_batch: int = 8
    max_queue: int = 64
    max_seconds: float = 600.0


class OverloadedError(XTunerError):
    """The queue is full."""


class TookTooLongError(XTunerError):
    """An answer took longer than `Limits.max_seconds`."""


@dataclass(frozen=True)
class Piece:
    """Generated text, and the scores of its tokens if requested. The first
    piece of an answer may be empty: it signals that the prompt was read."""

    text: str
    scores: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Done:
    """The answer is complete.

    Attributes:
        finish: 'stop' or 'length'.
        num_prompt, num_generated: Tokens.
    """

    finish: str
    num_prompt: int
    num_generated: int


@dataclass(frozen=True)
class Failed:
    """The answer ended with an error."""

    error: Exception


Event = Piece | Done | Failed


@dataclass(eq=False)
class Job:
    """A request for one answer.

    Attributes:
        model: The model that answers.
        prompt: Token ids; with images, one image token for each.
        options: Generation options.
        deliver: Called from the engine's thread with each event; must not block.
        messages: The messages of the prompt if it has images.
        top_logprobs: Alternatives to report of each token; None reports no scores.
        keep: Special tokens that are part of the text: those that mark tool calls.
        cancelled: The answer is no longer wanted.
    """

    model: ServedModel
    prompt: list[int]
    options: GenerationOptions
    deliver: Callable[[Event], None]
    messages: Sequence[Message] = ()
    top_logprobs: int | None = None
    keep: tuple[str, ...] = ()
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
