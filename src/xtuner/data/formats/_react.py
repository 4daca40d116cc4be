"""Turns that hold Thought, Action and Action Input, for `toolbench` and `agent_flan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from xtuner.calls import families
from xtuner.calls.families.base import parse
from xtuner.data.formats._tools import objects_in, tools_in
from xtuner.data.formats.base import RowError
from xtuner.types import Message

_ACTION = re.compile(r"^\s*Action:.*\n+\s*Action Input:", re.MULTILINE)
_THOUGHT = re.compile(r"^\s*Thought:[ \t]*")
_FINAL = re.compile(r"^\s*(?:Thought:.*?\n+)?\s*Final Answer:[ \t]*", re.DOTALL)
_RESULT = re.compile(r"^\s*(?:Response|Observation|Result):[ \t]*\n?")
_TOOL_LISTS = ("following APIs", "following tools", "access to the following", "可以使用的工具")


def is_action(text: str) -> bool:
    """Whether a turn calls a tool in this layout."""
    return _ACTION.search(text) is not None


def read_react(
    messages: Iterable[Message], *, column: str
) -> tuple[list[Message], tuple[Mapping[str, Any], ...]]:
    """The messages with calls and results instead of this layout, and the tools. A system message
    that lists tools describes the layout; it is replaced by the tools. The turn of the user after a
    call is its result if it begins with ``Response:`` or ``Observation:``.
    """
    tools: tuple[Mapping[str, Any], ...] = ()
    read: list[Message] = []
    for index, message in enumerate(messages):
        called = bool(read) and bool(read[-1].tool_calls)
        if message.role == "system" and any(words in message.content for words in _TOOL_LISTS):
            found = tools_in(objects_in(_as_json(message.content)))
            tools = (*tools, *found)
            if found:
                continue
        if message.role == "assistant":
            read.append(_assistant(message, f"{column}[{index}]"))
        elif message.role == "user" and called and _RESULT.match(message.content):
            read.append(Message("tool", _RESULT.sub("", message.content, count=1)))
        else:
            read.append(message)
    return read, tools


def _assistant(message: Message, where: str) -> Message:
    if not is_action(message.content):
        return replace(message, content=_FINAL.sub("", message.content, count=1))
    text, found = parse(families.load("react"), message.content)
    if wrong := next((each for each in found if each.problem and each.call is None), None):
        raise RowError(where, f"its action {wrong.problem}", "write the Action Input as JSON")
    calls = tuple(each.call for each in found if each.call is not None)
    return replace(message, content=_THOUGHT.sub("", text).strip(), tool_calls=calls)


def _as_json(text: str) -> str:
    """`text` with a list of tools that is written in Python as JSON, if it has one."""
    import json

    from xtuner.calls.read import python_literal

    start, end = text.find("[{"), text.rfind("}]")
    if 0 <= start < end:
        try:
            return json.dumps(python_literal(text[start : end + 2]))
        except (ValueError, TypeError):
            return text
    return text


def values_in(turns: Any) -> Iterator[str]:
    """The texts of turns that have `value`; nothing if these are not turns."""
    for turn in turns if isinstance(turns, list | tuple) else ():
        if isinstance(turn, Mapping) and isinstance(turn.get("value"), str):
            yield turn["value"]
