"""A list of messages with roles, as the chat interfaces take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.data.formats._images import read_names, read_parts, share_out
from xtuner.data.formats._tools import read_calls, read_tools
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
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


def convert(row: Row) -> Conversation:
    """Read the messages, the tools and the names of images."""
    turns = items(row, "messages")
    messages = read_messages(turns)
    named = [name for turn in turns for name in _named(turn)]
    names = _filled(named, read_names(row, "images"))
    if names or any(name is None for name in named):
        messages = share_out(messages, names, column="messages")
    return conversation(messages, tools=read_tools(row), column="messages")


def read_messages(turns: Sequence[Any], *, column: str = "messages") -> list[Message]:
    """Read messages; `column` is what the errors call the list."""
    return [_message(turn, place) for place, turn in objects(turns, within=column)]


def _message(turn: Mapping[str, Any], place: str) -> Message:
    name = text(turn, "role", within=place)
    role = _ROLES.get(name)
    if role is None:
        raise RowError(f"{place}role", f"is {name!r}", "it must be system, user, assistant or tool")
    calls = read_calls(turn.get("tool_calls"), where=f"{place}tool_calls")
    if calls and role != "assistant":
        raise RowError(f"{place}tool_calls", f"is in a turn of {name!r}", "only assistants call")
    if isinstance(turn.get("content"), list):
        content, _ = read_parts(turn["content"], where=f"{place}content")
        turn = {**turn, "content": content}
    # A tool may answer nothing, a call needs no words, and an empty system prompt is a choice.
    may_be_empty = bool(calls) or (role in ("system", "tool") and turn.get("content") is not None)
    return Message(
        role=role,
        content=(optional_text if may_be_empty else text)(turn, "content", within=place),
        loss=_loss(turn, role, place),
        tool_calls=calls,
        name=optional_text(turn, "name", within=place) or None,
        tool_call_id=optional_text(turn, "tool_call_id", within=place) or None,
    )


def _named(turn: Mapping[str, Any]) -> list[str | None]:
    """The images of a turn: their names, None for a part that has none, "" for a place in text,
    which without images in the row is but a word."""
    content = turn.get("content")
    if isinstance(content, list):
        return list(read_parts(content, where="content")[1])
    return [""] * content.count(IMAGE) if isinstance(content, str) else []


def _filled(named: Sequence[str | None], rest: Sequence[str]) -> list[str]:
    """The names of all images in order: those of the turns, the others from `rest`."""
    waiting = list(rest)
    names = [name or (waiting.pop(0) if waiting else "") for name in named]
    return [name for name in names if name] + waiting


def _loss(turn: Mapping[str, Any], role: Role, place: str) -> bool | None:
    """Read `loss`, or `weight`, the name which the interface for fine-tuning has for it."""
    key = "loss" if turn.get("loss") is not None else "weight"
    value = turn.get(key)
    if value is None:
        return None
    if value not in (0, 1):
        raise RowError(f"{place}{key}", f"is {value!r}", "it must be true or false")
    if value and role != "assistant":
        raise RowError(f"{place}{key}", f"is true in a turn of {role!r}", "only assistants learn")
    return bool(value)


FORMAT = Format(
    name="openai",
    description='Messages with roles, tools and calls; "loss": false leaves a turn out.',
    columns=("messages",),
    example={
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "Paris.", "loss": True},
        ]
    },
    convert=convert,
    optional=("tools", "images"),
    priority=10,
)
