"""Dialogues of moss-003-sft; commands become calls, and their results turns of tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xtuner.calls.families.python_text import read_python
from xtuner.calls.read import make_call
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    joined,
    kind,
    optional_text,
    system_turn,
    text,
)
from xtuner.types import Conversation, Message, Row

_OPENING = re.compile(r"^\s*<\|[^|<>]+\|>:?\s*")
_CLOSING = re.compile(r"<eo[a-z]>\s*$")
_API = re.compile(r"^-\s*(.+?):\s*enabled\.\s*API:\s*(\w+)\(([\w, ]*)\)", re.MULTILINE)
_COMMAND = re.compile(r"(\w+)\((.*)\)", re.DOTALL)
_HEADER = re.compile(r"^\w+\(.*\)[ ]*=>[ ]*\n?", re.MULTILINE)


def convert(row: Row) -> Conversation:
    """Read the turns in the order of their numbers."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping):
        problem = f"is {kind(chat)}" if "chat" in row else "is missing"
        raise RowError("chat", problem, "it must be an object with turn_1, turn_2, ...")
    instruction = optional_text(row, "meta_instruction")
    tools = _tools(instruction)
    messages = [*system_turn(instruction)]
    # A table of rows with different numbers of turns fills the missing turns with null.
    turns = {_number(name): turn for name, turn in chat.items() if turn is not None}
    for number in sorted(turns):
        messages += _exchange(turns[number], f"chat.turn_{number}", tools)
    return conversation(messages, tools=tools, column="chat")


def _tools(instruction: str) -> tuple[Mapping[str, Any], ...]:
    """The enabled tools, from lines such as ``- Web search: enabled. API: Search(query)``."""
    tools = []
    for words, name, parameters in _API.findall(instruction):
        names = [parameter.strip() for parameter in parameters.split(",") if parameter.strip()]
        schema = {"type": "object", "properties": {n: {"type": "string"} for n in names}}
        function = {"name": name, "description": words, "parameters": {**schema, "required": names}}
        tools.append({"type": "function", "function": function})
    return tuple(tools)


def _number(name: str) -> int:
    number = name.removeprefix("turn_")
    if not number.isdecimal():
        raise RowError(f"chat.{name}", "is not a turn", "name the turns turn_1, turn_2, ...")
    return int(number)


def _exchange(turn: Any, where: str, tools: Sequence[Mapping[str, Any]]) -> Iterator[Message]:
    if not isinstance(turn, Mapping):
        raise RowError(where, f"is {kind(turn)}", "it must be an object")
    within = f"{where}."
    yield Message("user", _required(turn, "Human", within))
    thoughts = _optional(turn, "Inner Thoughts", within)
    commands = _optional(turn, "Commands", within)
    results = _optional(turn, "Tool Responses", within)
    answer = _required(turn, "MOSS", within)
    if not commands:
        if results:
            hint = "fill it in"
            raise RowError(f"{within}Commands", "is empty, but there are Tool Responses", hint)
        yield Message("assistant", joined(thoughts, answer))
        return
    calls = _calls(commands, tools, f"{within}Commands")
    yield Message("assistant", thoughts, tool_calls=calls)
    for result in _results(results, len(calls)):
        yield Message("tool", result)
    yield Message("assistant", answer)


def _calls(
    commands: str, tools: Sequence[Mapping[str, Any]], where: str
) -> tuple[Mapping[str, Any], ...]:
    """The calls of a line such as ``Search("a"), Calculate("2+3")``."""
    found = read_python(commands, tools)
    if all(each.call is not None for each in found):
        return tuple(each.call for each in found if each.call is not None)
    # MOSS does not escape quotes within quotes, so one command may not be valid Python.
    command = _COMMAND.fullmatch(commands.strip())
    if command is None:
        raise RowError(where, "is not a call", 'write it as NAME("TEXT")')
    named = [tool["function"] for tool in tools if tool["function"]["name"] == command[1]]
    parameters = named[0]["parameters"]["properties"] if named else {}
    argument = next(iter(parameters), "argument_0")
    value = command[2].strip().removeprefix('"').removesuffix('"')
    return (make_call(command[1], {argument: value}),)


def _results(results: str, count: int) -> list[str]:
    """The results of `count` calls, without the calls that are repeated before them."""
    if not results:
        return []
    parts = [part.strip() for part in _HEADER.split(results)[1:]]
    return parts if len(parts) == count else [_HEADER.sub("", results, count=1).strip()]


def _required(turn: Mapping[str, Any], part: str, within: str) -> str:
    content = _without_markers(text(turn, part, within=within))
    if not content.strip():
        raise RowError(within + part, "is empty", "fill it in or remove the row")
    return content


def _optional(turn: Mapping[str, Any], part: str, within: str) -> str:
    content = _without_markers(optional_text(turn, part, within=within))
    return "" if content == "None" else content


def _without_markers(content: str) -> str:
    """Remove the markers around a text, such as ``<|Human|>: `` and ``<eoh>``."""
    return _CLOSING.sub("", _OPENING.sub("", content))


FORMAT = Format(
    name="moss",
    description="Numbered turns with role markers, which are removed; commands become calls.",
    columns=("meta_instruction", "chat"),
    example={
        "meta_instruction": "You are MOSS.",
        "chat": {
            "turn_1": {
                "Human": "<|Human|>: Are cats pets?<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                "Commands": "<|Commands|>: None<eoc>\n",
                "Tool Responses": "<|Results|>: None<eor>\n",
                "MOSS": "<|MOSS|>: Yes.<eom>\n",
            }
        },
    },
    convert=convert,
)
