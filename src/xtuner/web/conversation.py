"""Conversations of one browser tab: the same question to one model, or to two side by side."""

from __future__ import annotations

import contextlib
import copy
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xtuner import templates
from xtuner.chat.session import Session, ToolUse
from xtuner.errors import ConfigError, XTunerError
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import ImageInput
from xtuner.serve.engine import Engine, stream
from xtuner.serve.models import ServedModel
from xtuner.templates.base import Template
from xtuner.tools import loop
from xtuner.types import Message
from xtuner.web.turns import Request, Turn

AS_TRAINED = "auto"
_SECONDS_BETWEEN_UPDATES = 0.06

History = tuple[Message, ...]


@dataclass(frozen=True)
class Asked:
    """A question and how it is to be answered.

    Attributes:
        text: The user's text.
        images: Files that the question is about.
        options: Generation options.
        system: System prompt.
        template: 'auto' for the one of the training, or a named template.
        tools: The tools that the model may call, if any.
    """

    text: str
    images: tuple[str, ...] = ()
    options: GenerationOptions = field(default_factory=GenerationOptions)
    system: str = ""
    template: str = AS_TRAINED
    tools: ToolUse | None = None


@dataclass(frozen=True)
class Side:
    """The state of one side while it is answered.

    Attributes:
        events: What happened so far; pieces of text that follow each other are joined.
        request: A call that waits to be allowed.
        history: The conversation with the answer, at its end; None before.
        error: Why there is no answer.
        without_tools: Tools were given, but the template does not tell how the model calls them.
    """

    events: tuple[loop.Event, ...] = ()
    request: Request | None = None
    history: History | None = None
    error: str = ""
    without_tools: bool = False

    @property
    def text(self) -> str:
        """The text so far, without calls and results."""
        return "".join(event.text for event in self.events if isinstance(event, loop.Text))

    @property
    def rounds(self) -> int:
        """After how many rounds of calls the answer was given up; 0 if it was not."""
        last = self.events[-1] if self.events else None
        return last.rounds if isinstance(last, loop.Stopped) else 0


def answer(
    engine: Engine,
    models: Sequence[ServedModel],
    histories: Sequence[History],
    asked: Asked,
    turn: Turn,
) -> Iterator[list[Side]]:
    """Yield the states of all sides while they answer `asked`; the last one is complete.

    Args:
        engine: The engine that generates the answers.
        models: One per side.
        histories: The conversations so far, one per side.
        asked: The question.
        turn: Ends the answers, and allows calls; what was generated so far stays in the histories.
    """
    updates: queue.SimpleQueue[tuple[int, Side]] = queue.SimpleQueue()
    sides = [
        _Answering(engine, served, turn, _sender(updates, i)) for i, served in enumerate(models)
    ]
    for side, history in zip(sides, histories, strict=True):
        threading.Thread(target=side.run, args=(history, asked), daemon=True).start()
    states = [Side() for _ in models]
    shown, changed = 0.0, False
    try:
        while not all(state.error or state.history is not None for state in states):
            with contextlib.suppress(queue.Empty):
                index, state = updates.get(timeout=_SECONDS_BETWEEN_UPDATES if changed else None)
                states[index], changed = state, True
                if not updates.empty() or time.monotonic() - shown < _SECONDS_BETWEEN_UPDATES:
                    continue
            shown, changed = time.monotonic(), False
            yield list(states)
        yield list(states)
    finally:
        turn.stopped.set()


def _sender(updates: queue.SimpleQueue[tuple[int, Side]], index: int) -> Callable[[Side], None]:
    return lambda state: updates.put((index, state))


class _Answering:
    """Answers on one side, in a thread of its own."""

    def __init__(
        self, engine: Engine, served: ServedModel, turn: Turn, send: Callable[[Side], None]
    ) -> None:
        self._engine, self._served, self._turn, self._send = engine, served, turn, send
        self._events: tuple[loop.Event, ...] = ()

    def run(self, history: History, asked: Asked) -> None:
        """Answer `asked` after `history`; each change is sent."""
        try:
            session = self._session(asked)
            session.messages = list(history)
            with contextlib.closing(session.act(asked.text, asked.images)) as steps:
                for event in steps:
                    self._events = _joined(self._events, event)
                    self._send(Side(self._events))
                    if self._turn.stopped.is_set():
                        break
            idle = asked.tools is not None and session.tools is None
            history = tuple(session.messages)
            self._send(Side(self._events, history=history, without_tools=idle))
        except XTunerError as error:
            self._send(Side(error=str(error)))
        except Exception as error:
            self._send(Side(error=f"{type(error).__name__}: {error}"))

    def _session(self, asked: Asked) -> Session:
        served, template = self._served, _template(self._served, asked)
        use = asked.tools if template.tool_family else None
        return Session(
            served.weights.model,
            served.tokenizer,
            template=template,
            options=asked.options,
            vision=ImageInput(served.vision) if served.vision else None,
            tools=replace(use, allow=self._allow) if use else None,
            generate=stream(self._engine, served),
        )

    def _allow(self, call: Mapping[str, Any]) -> bool:
        allowed = self._turn.allow(call, lambda request: self._send(Side(self._events, request)))
        self._send(Side(self._events))
        return allowed


def _joined(events: tuple[loop.Event, ...], event: loop.Event) -> tuple[loop.Event, ...]:
    """`events` and `event`; text is added to the text before it."""
    last = events[-1] if events else None
    if isinstance(event, loop.Text) and isinstance(last, loop.Text):
        return (*events[:-1], loop.Text(last.text + event.text))
    return (*events, event)


def _template(served: ServedModel, asked: Asked) -> Template:
    """The template with the system prompt of the page.

    Raises:
        ConfigError: There is no template of this name.
    """
    if asked.template == AS_TRAINED:
        template = copy.copy(served.template)
        template.system = asked.system
        return template
    if asked.template not in templates.names():
        raise ConfigError(f"{asked.template!r} is not a named template")
    return templates.load(asked.template, served.tokenizer, system=asked.system)
