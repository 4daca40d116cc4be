"""Measure tool calling: every assistant turn of a data set is generated and compared.

    conversation ──cut before each assistant turn──► Question ──answer──► Outcome ──► Shares

The turns before a question come from the data, so a mistake does not affect the next turn.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtuner.calls.families.base import Family, parse
from xtuner.calls.read import arguments_of, name_of
from xtuner.types import Conversation, Message, Row

Call = tuple[str, Any]
"""Name and arguments."""


@dataclass(frozen=True)
class Question:
    """An assistant turn for the model to write.

    Attributes:
        messages: The conversation before it.
        tools: The tools that are shown.
        expected: The calls of the data; empty if the turn has none.
        where: The row, for reports.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    expected: tuple[Call, ...]
    where: str = ""

    @property
    def names(self) -> set[str]:
        """Names of the expected calls."""
        return {name for name, _ in self.expected}


@dataclass(frozen=True)
class Outcome:
    """The model's answer to a question.

    Attributes:
        called: The calls in it.
        malformed: Problems of text that should have been calls.
        text: The answer.
    """

    question: Question
    called: tuple[Call, ...]
    malformed: tuple[str, ...]
    text: str

    @property
    def tried(self) -> bool:
        """Whether it attempts a call, correctly or not."""
        return bool(self.called or self.malformed)

    @property
    def right_function(self) -> bool:
        """Whether it calls the expected functions, each as often as expected."""
        expected = sorted(name for name, _ in self.question.expected)
        return not self.malformed and sorted(name for name, _ in self.called) == expected

    @property
    def right_arguments(self) -> bool:
        """Whether it makes the expected calls, in any order."""
        expected = sorted(map(_comparable, self.question.expected))
        return not self.malformed and sorted(map(_comparable, self.called)) == expected

    def as_row(self) -> Row:
        """The outcome as a row of JSON."""
        return {
            "row": self.question.where,
            "expected": [{"name": n, "arguments": a} for n, a in self.question.expected],
            "called": [{"name": n, "arguments": a} for n, a in self.called],
            "malformed": list(self.malformed),
            "right_function": self.right_function,
            "right_arguments": self.right_arguments,
            "text": self.text,
        }


@dataclass(frozen=True)
class Shares:
    """Shares over questions, from 0 to 1; None without questions.

    Attributes:
        num_calls: Number of questions whose expected answer is a call.
        right_function, right_arguments: Share of these with the right functions or calls.
        valid_json: Share of answers with calls in which every call can be read.
        missing: Share of `num_calls` answered without any call.
        num_answers: Number of questions whose expected answer is not a call.
        needless: Share of these answered with a call.
    """

    num_calls: int
    right_function: float | None
    right_arguments: float | None
    valid_json: float | None
    missing: float | None
    num_answers: int
    needless: float | None

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Shares:
        """The shares over `outcomes`."""
        calls = [each for each in outcomes if each.question.expected]
        answers = [each for each in outcomes if not each.question.expected]
        tried = [each for each in outcomes if each.tried]
        return cls(
            num_calls=len(calls),
            right_function=_share(calls, lambda each: each.right_function),
            right_arguments=_share(calls, lambda each: each.right_arguments),
            valid_json=_share(tried, lambda each: not each.malformed),
            missing=_share(calls, lambda each: not each.tried),
            num_answers=len(answers),
            needless=_share(answers, lambda each: each.tried),
        )


def _share(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> float | None:
    return sum(map(holds, outcomes)) / len(outcomes) if outcomes else None


def questions_of(record: Conversation, *, where: str = "") -> Iterator[Question]:
    """The assistant turns of a conversation, each as a question.

    Turns that are excluded from the loss, and turns without a user turn before them, are skipped.
    """
    for index, message in enumerate(record.messages):
        before = record.messages[:index]
        if not message.supervised or not any(m.role == "user" for m in before):
            continue
        expected = tuple((name_of(c), arguments_of(c)) for c in message.tool_calls)
        yield Question(before, record.tools, expected, where)


def outcome_of(question: Question, text: str, family: Family) -> Outcome:
    """Compare the answer `text` with the expected one."""
    _, found = parse(family, text, tools=question.tools)
    called = tuple(
        (name_of(each.call), arguments_of(each.call)) for each in found if each.call is not None
    )
    return Outcome(question, called, tuple(f.problem for f in found if f.call is None), text)


def _comparable(call: Call) -> str:
    name, arguments = call
    return json.dumps([name, _normal(arguments)], sort_keys=True, ensure_ascii=False)


def _normal(value: Any) -> Any:
    """`value`, normalised: 3 equals 3.0, and outer white space of text is ignored."""
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normal(item) for item in value]
    return value


def called_tools(records: Iterable[Conversation]) -> set[str]:
    """Names of the tools that conversations call."""
    return {name_of(c) for r in records for m in r.messages for c in m.tool_calls}


def held_out_tools(names: Iterable[str], share: float) -> set[str]:
    """A share of the tools, at least one, selected by the hash of their names."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ordered[: max(1, round(share * len(ordered)))]) if ordered else set()


def split_by_tool(
    records: Sequence[Conversation], held_out: set[str]
) -> tuple[list[Conversation], list[Conversation]]:
    """Split conversations into those for training, which neither call nor show `held_out`, and
    those that call it."""
    train, held = [], []
    for record in records:
        if called_tools([record]) & held_out:
            held.append(record)
            continue
        shown = tuple(tool for tool in record.tools if name_of(tool) not in held_out)
        train.append(replace(record, tools=shown))
    return train, held


def as_openai_row(record: Conversation) -> Row:
    """A conversation as a row of the format 'openai'."""
    messages = []
    for message in record.messages:
        turn = message.as_dict()
        if message.loss is not None:
            turn["loss"] = message.loss
        messages.append(turn)
    return {"messages": messages, "tools": [dict(tool) for tool in record.tools]}
