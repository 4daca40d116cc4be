"""A system prompt with functions, and one text of all turns (glaive-function-calling)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from xtuner.data.formats._tools import objects_in, read_calls, tools_in
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    system_turn,
    text,
)
from xtuner.types import Conversation, Message, Role, Row

_TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE|A):[ \t]*", re.MULTILINE)
_ROLES: Mapping[str, Role] = {
    "USER": "user", "ASSISTANT": "assistant", "A": "assistant", "FUNCTION RESPONSE": "tool",
}  # fmt: skip
_END = "<|endoftext|>"
_CALL = "<functioncall>"
_QUOTED = re.compile(r"(\"arguments\":\s*)'(.*)'(\s*\}\s*)$", re.DOTALL)
_LISTING = re.compile(r",? with access to the following functions\..*$", re.DOTALL)


def convert(row: Row) -> Conversation:
    """Read functions and turns."""
    system = text(row, "system").removeprefix("SYSTEM:").strip()
    tools = tools_in(objects_in(system))
    if tools:
        system = _LISTING.sub(".", system[: system.find("{")]).strip()
    chat = text(row, "chat")
    starts = list(_TURN.finditer(chat))
    if not starts:
        hint = "it must have lines that begin with USER: and ASSISTANT:"
        raise RowError("chat", "has no turns", hint)
    ends = [match.start() for match in starts[1:]] + [len(chat)]
    messages = [
        _message(_ROLES[match[1]], chat[match.end() : end])
        for match, end in zip(starts, ends, strict=True)
    ]
    return conversation([*system_turn(system), *messages], tools=tools, column="chat")


def _message(role: Role, content: str) -> Message:
    content = content.replace(_END, "").strip()
    if role != "assistant" or _CALL not in content:
        return Message(role, content)
    text, *calls = content.split(_CALL)
    read: tuple[Mapping[str, Any], ...] = ()
    for call in calls:
        read += read_calls(_as_json(call.strip()), where="chat")
    return Message(role, text.strip(), tool_calls=read)


def _as_json(call: str) -> Any:
    """The call with its arguments, which are in single quotes, as an object."""
    import json

    def replaced(match: re.Match[str]) -> str:
        return match[1] + json.dumps(match[2]) + match[3]

    return _QUOTED.sub(replaced, call)


FORMAT = Format(
    name="glaive",
    description="Functions in the system prompt, and one text of all turns.",
    columns=("system", "chat"),
    example={
        "system": 'SYSTEM: Functions -\n{"name": "today", "parameters": {}}',
        "chat": 'USER: Day?\n\nASSISTANT: <functioncall> {"name": "today"}',
    },
    convert=convert,
)
