"""What the chat window shows of a conversation: questions, thoughts, calls, results and answers.

Message (of the history), Event (of an answer in progress) ──► Part ──► entry of gr.Chatbot
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from xtuner.calls.read import arguments_of, name_of
from xtuner.i18n import Words
from xtuner.tools import loop
from xtuner.types import IMAGE, Message
from xtuner.web.conversation import Asked, History, Side

CURSOR = "▌"
Entry = dict[str, Any]
"""A message of gr.Chatbot."""

_THOUGHT = re.compile(r"\s*<think>(.*?)(</think>\s*|$)", re.S)
_UNSAFE = re.compile(r"[^\w.-]", re.ASCII)


@dataclass(frozen=True)
class Part:
    """A part of an answer.

    Attributes:
        kind: What it is; 'fault' is text that should have been a call.
        text: What is shown.
        tool: Name of the tool of a call or result.
    """

    kind: Literal["thought", "call", "result", "fault", "answer"]
    text: str
    tool: str = ""


def of_history(history: History, words: Words) -> list[Entry]:
    """The entries of a conversation."""
    return [entry for turn in _turns(history) for entry in _of_turn(turn, words)]


def of_question(asked: Asked) -> list[Entry]:
    """The entries of a question."""
    return _of_question(asked.text, asked.images)


def of_side(side: Side, words: Words) -> list[Entry]:
    """The entries of an answer, with a cursor while it is in progress."""
    parts = list(_of_events(side.events))
    if side.history is None and side.request is None:
        if not parts or parts[-1].kind not in ("thought", "answer"):
            parts.append(Part("answer", ""))
        parts[-1] = replace(parts[-1], text=parts[-1].text + CURSOR)
    return _entries(parts, words)


def questions(history: History) -> list[Message]:
    """The messages that the user wrote."""
    return [turn[0] for turn in _turns(history)]


def before(history: History, number: int) -> History:
    """The conversation before its question `number`; negative ones count from the end."""
    turns = _turns(history)
    if not -len(turns) <= number < len(turns):
        return history
    return tuple(message for turn in turns[:number] for message in turn)


def question_at(history: History, index: int, words: Words) -> int:
    """The number of the question that the shown entry `index` belongs to."""
    end = 0
    turns = _turns(history)
    for number, turn in enumerate(turns):
        end += len(_of_turn(turn, words))
        if index < end:
            return number
    return len(turns) - 1


def text_of(message: Message) -> str:
    """The text of a message without the placeholders of its images."""
    if not message.images:
        return message.content
    return message.content.replace(IMAGE, "").strip()


def shown_call(call: Mapping[str, Any]) -> str:
    """The arguments of a call as Markdown; text of several lines, such as code, as it is."""
    arguments = arguments_of(call)
    if isinstance(arguments, Mapping) and len(arguments) == 1:
        (value,) = arguments.values()
        if isinstance(value, str) and "\n" in value.strip():
            return fenced(value)
    return fenced(json.dumps(arguments, ensure_ascii=False, indent=2))


def fenced(text: str) -> str:
    """`text` as a block of code in Markdown, which can contain no markup."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def plain_name(call: Mapping[str, Any]) -> str:
    """The name of a call's tool, without what a model could use as markup."""
    return _UNSAFE.sub("_", name_of(call))


def _turns(history: History) -> list[tuple[Message, ...]]:
    """The conversation, split before each question."""
    turns: list[list[Message]] = []
    for message in history:
        if message.role == "user" and not isinstance(message, loop.Feedback):
            turns.append([])
        if turns:
            turns[-1].append(message)
    return [tuple(turn) for turn in turns]


def _of_turn(turn: Sequence[Message], words: Words) -> list[Entry]:
    asked, *rest = turn
    parts = [part for message in rest for part in _of_message(message)]
    return [*_of_question(text_of(asked), asked.images), *_entries(parts, words)]


def _of_question(text: str, images: Sequence[str]) -> list[Entry]:
    entries: list[Entry] = [{"role": "user", "content": {"path": path}} for path in images]
    return [*entries, {"role": "user", "content": text}] if text else entries


def _of_message(message: Message) -> Iterator[Part]:
    if message.role == "tool":
        yield Part("result", message.content, message.name or "")
    elif isinstance(message, loop.Feedback):
        yield Part("fault", message.content)
    else:
        if message.reasoning:
            yield Part("thought", message.reasoning)
        yield from _prose(text_of(message), called=bool(message.tool_calls))
        yield from map(_called, message.tool_calls)


def _of_events(events: Sequence[loop.Event]) -> Iterator[Part]:
    for event, after in itertools.zip_longest(events, events[1:]):
        match event:
            case loop.Text(text):
                yield from _prose(text, called=isinstance(after, loop.Called))
            case loop.Called(call):
                yield _called(call)
            case loop.Returned(call, result):
                yield Part("result", result.text, name_of(call))
            case loop.Malformed(text, problem):
                yield Part("fault", f"{problem}\n{text}")


def _prose(text: str, *, called: bool) -> Iterator[Part]:
    """Text as thought and answer; text before a call is a thought."""
    if found := _THOUGHT.match(text):
        if found[1].strip():
            yield Part("thought", found[1].strip())
        text = text[found.end() :]
    if text.strip():
        yield Part("thought" if called else "answer", text.strip() if called else text)


def _called(call: Mapping[str, Any]) -> Part:
    return Part("call", shown_call(call), plain_name(call))


def _entries(parts: Iterable[Part], words: Words) -> list[Entry]:
    """The entries of an answer; one without thoughts and calls is plain text."""
    parts = list(parts)
    plain = all(part.kind == "answer" for part in parts)
    return [_entry(part, words, plain=plain) for part in parts]


def _entry(part: Part, words: Words, *, plain: bool) -> Entry:
    text = fenced(part.text) if part.kind in ("result", "fault") else part.text
    entry: Entry = {"role": "assistant", "content": text}
    if not plain:
        title = words(f"part_{part.kind}", tool=_UNSAFE.sub("_", part.tool))
        folded = {"status": "done"} if part.kind == "thought" else {}
        entry["metadata"] = {"title": title, **folded}
    return entry
