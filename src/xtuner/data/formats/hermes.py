"""Turns with ``<tool_call>`` and ``<tool_response>`` in their text (Hermes function calling)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from xtuner.data.formats._react import values_in
from xtuner.data.formats._tools import objects_in, read_calls, read_tools, tools_in
from xtuner.data.formats._turns import TURN_KEYS, read_turns
from xtuner.data.formats.base import Format, conversation, items, optional_text, system_turn
from xtuner.types import Conversation, Message, Row

_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_RESULT = re.compile(r"<tool_response>\s*(.*?)\s*</tool_response>", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)


def convert(row: Row) -> Conversation:
    """Read the turns; tagged calls and results become calls and turns of tools.

    A system message with ``<tools>`` explains the tags; it is replaced by the tools.
    """
    turns = read_turns(items(row, "conversations"), column="conversations")
    tools = read_tools(row)
    system = system_turn(optional_text(row, "system"))
    messages: list[Message] = []
    for index, turn in enumerate([*system, *turns], start=-len(system)):
        listed = _TOOLS.findall(turn.content) if turn.role == "system" else []
        if listed:
            tools = tools or tools_in([v for text in listed for v in _values(text)])
        else:
            messages += _parts(turn, f"conversations[{index}].value")
    return conversation(messages, tools=tools, column="conversations")


def _values(text: str) -> list[Any]:
    from xtuner.calls.read import python_literal

    try:
        value = python_literal(text)
    except ValueError:
        return objects_in(text)
    return value if isinstance(value, list) else [value]


def _parts(turn: Message, where: str) -> Iterator[Message]:
    if turn.role == "assistant" and _CALL.search(turn.content):
        calls: tuple[Mapping[str, Any], ...] = ()
        for text in _CALL.findall(turn.content):
            calls += read_calls(text, where=where)
        content = _CALL.sub("", turn.content).strip()
        yield replace(turn, content=content, tool_calls=calls)
        return
    results = _RESULT.findall(turn.content) if turn.role in ("tool", "user") else []
    if not results:
        yield turn
    for text in results:
        yield Message("tool", text)


def _recognised(row: Row) -> bool:
    found = values_in(row.get("conversations"))
    return any(_CALL.search(text) or _TOOLS.search(text) for text in found)


FORMAT = Format(
    name="hermes",
    description="Turns with <tool_call> and <tool_response>, which become calls and results.",
    columns=("conversations",),
    example={
        "conversations": [
            {"from": "human", "value": "What day is it?"},
            {"from": "gpt", "value": '<tool_call>{"name": "today"}</tool_call>'},
            {"from": "tool", "value": "<tool_response>Friday</tool_response>"},
            {"from": "gpt", "value": "It is Friday."},
        ]
    },
    convert=convert,
    optional=("system", "tools"),
    priority=1,
    by_row=True,
    recognise=_recognised,
    turn_keys={"conversations": TURN_KEYS},
)
