"""Conversations of one browser tab: the same question to one model, or to two side by side."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from xtuner import templates
from xtuner.chat.session import Session
from xtuner.errors import ConfigError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import ImageInput
from xtuner.serve.engine import Engine, stream
from xtuner.serve.models import ServedModel
from xtuner.templates.base import Template
from xtuner.types import Message

AS_TRAINED = "auto"
_SECONDS_BETWEEN_UPDATES = 0.06

History = tuple[Message, ...]


@dataclass(frozen=True)
class Asked:
    """A question and how it is to be answered.

    Attributes:
        text: of the user.
        images: files that the question is about.
        options: of the generation.
        system: system prompt.
        template: 'auto' for the one of the training, or a named template.
    """

    text: str
    images: tuple[str, ...] = ()
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str = ""
    template: str = AS_TRAINED


@dataclass(frozen=True)
class Side:
    """The state of one side while it is answered.

    Attributes:
        text: of the answer so far.
        history: the conversation with the answer, at its end; None before.
        error: why there is no answer.
    """

    text: str = ""
    history: History | None = None
    error: str = ""


class Stops:
    """Lets a button stop the answers of its browser tab, and the tab's closing, too."""

    def __init__(self) -> None:
        self._events: dict[str, threading.Event] = {}

    def begin(self, tab: str) -> threading.Event:
        """An event that `stop` sets, for a new answer; an older one is stopped."""
        self.stop(tab)
        event = self._events[tab] = threading.Event()
        return event

    def stop(self, tab: str) -> None:
        """Stop what is being answered in `tab`."""
        if event := self._events.pop(tab, None):
            event.set()


def answer(
    engine: Engine,
    models: Sequence[ServedModel],
    histories: Sequence[History],
    asked: Asked,
    stop: threading.Event,
) -> Iterator[list[Side]]:
    """Yield the states of all sides while they answer `asked`; the last one is complete.

    Args:
        engine: generates.
        models: one per side.
        histories: the conversations so far, one per side.
        asked: the question.
        stop: ends the answers; what was said so far stays in the histories.
    """
    news: queue.SimpleQueue[tuple[int, Side]] = queue.SimpleQueue()
    threads = [
        threading.Thread(
            target=_answer,
            args=(engine, served, history, asked, stop, _teller(news, i)),
            daemon=True,
        )
        for i, (served, history) in enumerate(zip(models, histories, strict=True))
    ]
    for thread in threads:
        thread.start()
    sides = [Side() for _ in models]
    shown = 0.0
    try:
        while not all(side.error or side.history is not None for side in sides):
            index, side = news.get()
            sides[index] = side
            now = time.monotonic()
            if now - shown > _SECONDS_BETWEEN_UPDATES and news.empty():
                shown = now
                yield list(sides)
        yield list(sides)
    finally:
        stop.set()


def _teller(news: queue.SimpleQueue[tuple[int, Side]], index: int) -> Callable[[Side], None]:
    return lambda side: news.put((index, side))


def _answer(
    engine: Engine,
    served: ServedModel,
    history: History,
    asked: Asked,
    stop: threading.Event,
    say: Callable[[Side], None],
) -> None:
    """Answer for one side."""
    try:
        session = _session(engine, served, asked)
        session.messages = list(history)
        text = ""
        with contextlib.closing(session.ask(asked.text, asked.images)) as pieces:
            for piece in pieces:
                text += piece
                say(Side(text))
                if stop.is_set():
                    break
        say(Side(text, tuple(session.messages)))
    except XTunerError as error:
        say(Side(error=str(error)))
    except Exception as error:
        say(Side(error=f"{type(error).__name__}: {error}"))


def _session(engine: Engine, served: ServedModel, asked: Asked) -> Session:
    return Session(
        served.weights.model,
        served.tokenizer,
        template=_template(served, asked),
        options=asked.options,
        vision=ImageInput(served.vision) if served.vision else None,
        generate=stream(engine, served),
    )


def _template(served: ServedModel, asked: Asked) -> Template:
    """The template with the system prompt of the page.

    Raises:
        ConfigError: there is no template of this name.
    """
    if asked.template == AS_TRAINED:
        template = copy.copy(served.template)
        template.system = asked.system
        return template
    if asked.template not in templates.names():
        raise ConfigError(f"{asked.template!r}: is no named template")
    return templates.load(asked.template, served.tokenizer, system=asked.system)
