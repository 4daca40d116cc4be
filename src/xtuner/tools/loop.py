"""The loop of an agent: the model answers, its calls are run, and it gets their results.

messages ──answer──► Text, Call ──allowed?──► ToolBox ──► Returned ──► next round ... ──► answer
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from xtuner.calls.check import call_id
from xtuner.calls.families.base import Family, Found, Parser, Prose
from xtuner.calls.read import name_of
from xtuner.tools.provider import Result
from xtuner.tools.toolbox import ToolBox
from xtuner.types import Message

Answer = Callable[[Sequence[Message]], Generator[str, None, None]]
"""From a conversation to the pieces of the model's answer."""
Allow = Callable[[Mapping[str, Any]], bool]
"""Whether a call may run."""

NOT_ALLOWED = "Error: the user did not allow this call"


@dataclass(frozen=True)
class Text:
    """A piece of the answer; before a call it is the model's thought."""

    text: str


@dataclass(frozen=True)
class Called:
    """A call of the answer."""

    call: Mapping[str, Any]


@dataclass(frozen=True)
class Returned:
    """The result of a call."""

    call: Mapping[str, Any]
    result: Result


@dataclass(frozen=True)
class Malformed:
    """Text that should have been a call, and the problem, which is reported to the model."""

    text: str
    problem: str


@dataclass(frozen=True)
class Stopped:
    """The loop ended after this many rounds without a final answer."""

    rounds: int


Event = Text | Called | Returned | Malformed | Stopped


@dataclass(frozen=True)
class Feedback(Message):
    """Tells the model that a call could not be read; a turn of the user that no user wrote."""


def converse(
    answer: Answer,
    messages: Sequence[Message],
    *,
    tools: ToolBox,
    family: Family,
    allow: Allow = lambda call: True,
    max_rounds: int = 8,
    new: list[Message] | None = None,
    turn_of: Callable[[str], Message] = lambda text: Message("assistant", text),
) -> Generator[Event, None, list[Message]]:
    """Answer a conversation with calls; yield events, and return the new messages.

    Args:
        answer: Generates an answer in pieces.
        messages: The conversation, which ends with the question.
        tools: Run the calls.
        family: How the model writes calls.
        allow: Called before each call; returns whether it may run.
        max_rounds: Maximum number of answers with calls.
        new: Receives new messages as they are completed, so that they are kept if the caller stops
            the generator.
        turn_of: Makes an assistant turn from the model's text.
    """
    new = [] if new is None else new
    first = 1 + sum(len(message.tool_calls) for message in messages)
    for _ in range(max_rounds):
        written, found = yield from _answered(answer, [*messages, *new], tools, family)
        calls, wrong = [], []
        for each in found:
            if each.call is None:
                wrong.append(each)
                continue
            calls.append({**each.call, "id": call_id(first)})
            first += 1
        if not found:
            new.append(turn_of(written))
            return new
        text = written if calls else written + "".join(each.text for each in wrong)
        new.append(replace(turn_of(text.rstrip()), tool_calls=tuple(calls)))
        for call in calls:
            yield Called(call)
            result = tools.call(call) if allow(call) else Result(NOT_ALLOWED, failed=True)
            new.append(Message("tool", result.text, name=name_of(call), tool_call_id=call["id"]))
            yield Returned(call, result)
        for each in wrong:
            yield Malformed(each.text, each.problem)
        if not calls:
            problem = "; ".join(each.problem for each in wrong)
            new.append(Feedback("user", f"Error: the tool call {problem}. Write it again."))
    yield Stopped(max_rounds)
    return new


def _answered(
    answer: Answer, messages: Sequence[Message], tools: ToolBox, family: Family
) -> Generator[Event, None, tuple[str, list[Found]]]:
    """Generate one answer; yield its text in pieces."""
    parser = Parser(family, tools.schemas)
    written, found = "", []

    def taken(events: Sequence[Prose | Found]) -> Generator[Event, None, None]:
        nonlocal written
        for event in events:
            if isinstance(event, Found):
                found.append(event)
                continue
            written += event.text
            if event.text and not (found and not event.text.strip()):
                yield Text(event.text)

    with closing(answer(messages)) as pieces:
        for piece in pieces:
            yield from taken(parser.add(piece))
    yield from taken(parser.finish())
    return written, found
