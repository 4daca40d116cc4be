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
        max_batch: answers that are generated at the same time.
        max_queue: requests that wait; further ones are refused.
        max_seconds: after which an answer is given up, counted from its request.
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
    """Text that was generated, and the scores of its tokens if they were asked for. The first
    piece of an answer may be empty: it tells that the prompt was read."""

    text: str
    scores: Sequence[TokenScore] = ()


@dataclass(frozen=True)
class Done:
    """The answer is complete.

    Attributes:
        finish: 'stop' or 'length'.
        num_prompt, num_generated: tokens.
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
        model: answers.
        prompt: token ids; with images, one image token for each.
        options: of the generation.
        deliver: called from the engine's thread with each event; must not block.
        messages: of the prompt, where it has images.
        top_logprobs: alternatives to report of each token; None reports no scores.
        keep: special tokens that are part of the text: those that mark tool calls.
        cancelled: the answer is no longer wanted.
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
