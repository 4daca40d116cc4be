"""A list of messages with roles, as in chat APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.data.formats._images import read_names, read_parts, share_out
from xtuner.data.formats._supervision import SUPERVISION_KEYS, read_loss, read_reasoning
from xtuner.data.formats._tools import read_calls, read_tools
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
    listed,
    objects,
    optional_text,
    text,
)
from xtuner.types import IMAGE, Conversation, Message, Role, Row

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}

TURN_KEYS = (
    "role", "content", "tool_calls", "function_call", "name", "tool_call_id", *SUPERVISION_KEYS,
)  # fmt: skip


def convert(row: Row) -> Conversation:
    """Read messages, tools and image names."""
    turns = items(listed(row, "messages"), "messages")
    messages = read_messages(turns)
    named = [name for turn in turns for name in _named(turn)]
    names = _filled(named, read_names(row, "images"))
    if names or any(name is None for name in named):
        messages = share_out(messages, names, column="messages")
    tools = read_tools(row) or read_tools(row, "functions")  # the name before there were tools
    return conversation(messages, tools=tools, column="messages")


def read_messages(turns: Sequence[Any], *, column: str = "messages") -> list[Message]:
    """Read messages; `column` is the name of the list in errors."""
    return [_message(turn, path) for path, turn in objects(turns, within=column)]


def _message(turn: Mapping[str, Any], path: str) -> Message:
    name = text(turn, "role", within=path)
    role = _ROLES.get(name)
    if role is None:
        raise RowError(f"{path}role", f"is {name!r}", "it must be system, user, assistant or tool")
    calls = _calls(turn, name, path)
    if isinstance(turn.get("content"), list):
        content, _ = read_parts(turn["content"], where=f"{path}content")
        turn = {**turn, "content": content}
    # Tool results, turns with tool calls and system messages may be empty.
    may_be_empty = bool(calls) or (role in ("system", "tool") and turn.get("content") is not None)
    return Message(
        role=role,
        content=(optional_text if may_be_empty else text)(turn, "content", within=path),
        tool_calls=calls,
        name=optional_text(turn, "name", within=path) or None,
        tool_call_id=optional_text(turn, "tool_call_id", within=path) or None,
        reasoning=read_reasoning(turn, role, path),
        **read_loss(turn, role, path),
    )


def _calls(turn: Mapping[str, Any], role: str, path: str) -> tuple[Mapping[str, Any], ...]:
    """Read `tool_calls`, or `function_call`, the older name of a single call."""
    calls: tuple[Mapping[str, Any], ...] = ()
    for key in ("tool_calls", "function_call"):
        found = read_calls(turn.get(key), where=f"{path}{key}")
        if found and _ROLES[role] != "assistant":
            hint = "only assistant turns may have tool calls"
            raise RowError(f"{path}{key}", f"is in a turn of {role!r}", hint)
        if found and calls:
            raise RowError(f"{path}{key}", "is given together with tool_calls", "keep one of them")
        calls = calls or found
    return calls


def _named(turn: Mapping[str, Any]) -> list[str | None]:
    """Image names of a turn: None for an image part without a name, "" for ``<image>`` in text,
    which is plain text if the row has no images."""
    content = turn.get("content")
    if isinstance(content, list):
        return list(read_parts(content, where="content")[1])
    return [""] * content.count(IMAGE) if isinstance(content, str) else []


def _filled(named: Sequence[str | None], rest: Sequence[str]) -> list[str]:
    """The names of all images in order: those of the turns, and `rest` for the others."""
    remaining = list(rest)
    names = [name or (remaining.pop(0) if remaining else "") for name in named]
    return [name for name in names if name] + remaining


FORMAT = Format(
    name="openai",
    description='Messages with roles, tools and calls; "loss": false excludes a turn.',
    columns=("messages",),
    example={
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris.", "loss": True},
        ]
    },
    convert=convert,
    optional=("tools", "functions", "images"),
    priority=10,
    turn_keys={"messages": TURN_KEYS},
)
