"""Dialogues of an agent, whose answers also hold calls and results of tools (MSAgent-Bench)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from xtuner.data.formats._react import values_in
from xtuner.data.formats._tools import objects_in, read_calls, tools_in
from xtuner.data.formats._turns import TURN_KEYS, read_turns
from xtuner.data.formats.base import Format, conversation, items, listed
from xtuner.types import Conversation, Message, Row

_PART = re.compile(
    r"<\|startof(think|exec)\|>\s*(.*?)\s*<\|endof(?:think|exec)\|>", re.DOTALL
)  # fmt: skip
_FENCE = re.compile(r"^```(?:JSON|json)?\s*|\s*```$")
_LISTING = "当前对话可以使用的插件信息"


def convert(row: Row) -> Conversation:
    """Read the turns; calls become tool calls and results turns of tools."""
    turns = read_turns(items(listed(row, "conversations"), "conversations"), column="conversations")
    messages: list[Message] = []
    tools: tuple[Mapping[str, Any], ...] = ()
    for index, turn in enumerate(turns):
        if turn.role == "system" and (found := _plugins(turn.content)):
            tools = found
            text = turn.content.partition(_LISTING)[0].strip()
            messages += [replace(turn, content=text)] if text else []
        else:
            messages += _parts(turn, f"conversations[{index}].value")
    return conversation(messages, tools=tools, column="conversations")


def _plugins(content: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that a system message describes, one for each path of a plugin."""
    schemas = [
        value.get("plugin_schema_for_model")
        for value in objects_in(content)
        if isinstance(value, Mapping)
    ]
    paths = [
        path
        for schema in schemas
        if isinstance(schema, Mapping) and isinstance(schema.get("paths"), list)
        for path in schema["paths"]
    ]
    return tools_in(paths)


def _parts(turn: Message, where: str) -> Iterator[Message]:
    """The turns that one answer holds: text with calls, results, text."""
    if turn.role != "assistant" or turn.tool_calls:
        yield turn
        return
    text, at = "", 0
    reasoning = turn.reasoning
    for part in _PART.finditer(turn.content):
        text += turn.content[at : part.start()]
        at = part.end()
        inner = _FENCE.sub("", part[2])
        if part[1] == "exec":
            if text.strip():
                yield replace(turn, content=text.strip(), reasoning=reasoning)
            yield Message("tool", inner)
        else:
            calls = read_calls(inner, where=where)
            yield replace(turn, content=text.strip(), tool_calls=calls, reasoning=reasoning)
        text = reasoning = ""
    rest = text + turn.content[at:]
    if rest.strip():
        yield replace(turn, content=rest.strip() if at else rest, reasoning=reasoning)


def _recognised(row: Row) -> bool:
    found = row.get("conversations")
    spoken = [found] if isinstance(found, str) else values_in(found)
    return any("<|startofthink|>" in text or "<|startofexec|>" in text for text in spoken)


FORMAT = Format(
    name="msagent",
    description="Turns as text (JSON or Python) or a list; marked calls and results.",
    columns=("conversations",),
    example={
        "conversations": [
            {"from": "user", "value": "What day is it?"},
            {
                "from": "assistant",
                "value": '<|startofthink|>{"api_name": "today"}<|endofthink|>',
            },
        ]
    },
    convert=convert,
    priority=-1,
    recognise=_recognised,
    turn_keys={"conversations": TURN_KEYS},
)
