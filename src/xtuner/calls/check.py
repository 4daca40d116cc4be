"""Check the calls of a conversation, and match results to calls by id."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from xtuner.calls.read import arguments_of, name_of
from xtuner.calls.schema import problems as schema_problems
from xtuner.types import Conversation, Message, Preference, Record

Errors = Literal["drop", "keep"]
Thoughts = Literal["learn", "mask", "remove"]


@dataclass(frozen=True)
class Problem:
    """A problem of a call or result: where it is in the conversation, what it is, how to fix it."""

    where: str
    problem: str
    hint: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; {self.hint}"


@dataclass(frozen=True)
class CallPolicy:
    """What happens to tool calls when rows are encoded.

    Attributes:
        errors: 'drop' discards a row whose calls are wrong, 'keep' trains on it.
        thoughts: Whether thoughts are supervised ('learn'), masked ('mask'), or removed ('remove').
            A thought is the reasoning of an assistant turn, or the text before a call.
    """

    errors: Errors = "drop"
    thoughts: Thoughts = "learn"

    def applied(self, record: Record) -> Record | Problem:
        """The record to encode, or the problem for which it is dropped."""
        problem = self.problem(record) if self.errors == "drop" else None
        return self._prepared(record) if problem is None else problem

    def problem(self, record: Record) -> Problem | None:
        """The first problem of the calls of a record."""
        match record:
            case Preference():
                return self.problem(record.chosen) or self.problem(record.rejected)
            case Conversation():
                return next(call_problems(record), None)
        return None

    def _prepared(self, record: Record) -> Record:
        match record:
            case Preference(chosen, rejected):
                return Preference(
                    self._with_thoughts(with_ids(chosen)), self._with_thoughts(with_ids(rejected))
                )
            case Conversation():
                return self._with_thoughts(with_ids(record))
        return record

    def _with_thoughts(self, record: Conversation) -> Conversation:
        if self.thoughts == "learn":
            return record
        messages = tuple(self._treated(m) if m.role == "assistant" else m for m in record.messages)
        return replace(record, messages=messages)

    def _treated(self, message: Message) -> Message:
        has_thought = message.reasoning or (message.tool_calls and message.content.strip())
        if not has_thought:
            return message
        if self.thoughts == "mask":
            return replace(message, mask_thought=True)
        content = "" if message.tool_calls else message.content
        return replace(message, reasoning="", content=content)


def call_problems(record: Conversation) -> Iterator[Problem]:
    """Yield the problems of the calls and results of a conversation.

    Names and arguments are compared with the tools of the row, if it declares any.
    """
    schemas = {name_of(tool): tool["function"].get("parameters") for tool in record.tools}
    waiting: list[str | None] | None = None
    for turn, message in enumerate(record.messages, start=1):
        if message.role == "tool":
            if problem := _result_problem(message, waiting, turn):
                yield problem
            continue
        waiting = None
        if message.tool_calls:
            waiting = [call.get("id") for call in message.tool_calls]
            for call in message.tool_calls:
                yield from _problems_of_call(
                    call, schemas, f"turn [{turn}], call of '{name_of(call)}'"
                )


def _result_problem(
    message: Message, waiting: Sequence[str | None] | None, turn: int
) -> Problem | None:
    where = f"turn [{turn}]"
    if waiting is None:
        hint = "add the call to the turn of the assistant before it, or remove the result"
        return Problem(where, "is the result of a tool, but no call precedes it", hint)
    known = [name for name in waiting if name is not None]
    if message.tool_call_id and known and message.tool_call_id not in known:
        problem = f"answers the call '{message.tool_call_id}', but there is no call with that id"
        return Problem(where, problem, "give the result the id of its call")
    return None


def _problems_of_call(
    call: Mapping[str, Any], schemas: Mapping[str, Any], where: str
) -> Iterator[Problem]:
    name, arguments = name_of(call), arguments_of(call)
    if isinstance(arguments, str):
        yield Problem(where, "has arguments that are not valid JSON", "write them as a JSON object")
    elif not isinstance(arguments, Mapping):
        yield Problem(where, "has arguments that are not an object", "write them as a JSON object")
    if not schemas:
        return
    if name not in schemas:
        hint = "add the tool to the tools of the row, or correct the name"
        yield Problem(where, "calls a tool that the row does not declare", hint)
    elif isinstance(arguments, Mapping) and isinstance(schemas[name], Mapping):
        for problem in schema_problems(arguments, schemas[name]):
            hint = "correct the argument, or the schema of the tool"
            yield Problem(where, f"does not fit the schema: '{problem}'", hint)


def with_ids(record: Conversation) -> Conversation:
    """Give every call an id and every result the id and name of its call.

    Results without an id belong to the calls before them in order. Ids in the data are kept.
    """
    if not any(message.tool_calls for message in record.messages):
        return record
    number, messages = 0, []
    waiting: list[tuple[str, str]] = []
    for message in record.messages:
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                number += 1
                calls.append({"id": call_id(number), **call})
            waiting = [(str(call["id"]), name_of(call)) for call in calls]
            message = replace(message, tool_calls=tuple(calls))
        elif message.role == "tool":
            message = _linked(message, waiting)
        messages.append(message)
    return replace(record, messages=tuple(messages))


def call_id(number: int) -> str:
    """The id of call `number`: nine letters and digits, which all templates accept."""
    return f"call{number:05d}"


def _linked(message: Message, waiting: list[tuple[str, str]]) -> Message:
    """A result with the id and name of its call, which is removed from `waiting`."""
    by_id = {given: index for index, (given, _) in enumerate(waiting)}
    index = by_id.get(message.tool_call_id or "", 0)
    if not waiting:
        return message
    given, name = waiting.pop(index)
    return replace(message, tool_call_id=message.tool_call_id or given, name=message.name or name)
