"""Read turns with ``from`` and ``value``, for `sharegpt` and `msagent`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.data.formats._supervision import SUPERVISION_KEYS, read_loss, read_reasoning
from xtuner.data.formats._tools import read_calls
from xtuner.data.formats.base import RowError, objects, optional_text, text
from xtuner.types import Message, Role

_ROLES: Mapping[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function": "tool",
}

TURN_KEYS = ("from", "value", *SUPERVISION_KEYS)
"""The keys of a turn that are read."""


def read_turns(turns: Sequence[Any], *, column: str) -> list[Message]:
    """Read turns; `column` is the name of the list in errors."""
    return [_turn(turn, path) for path, turn in objects(turns, within=column)]


def _turn(turn: Mapping[str, Any], path: str) -> Message:
    if "from" not in turn and "role" in turn:
        hint = "rename the column to 'messages' and set dataset_format = 'openai'"
        raise RowError(f"{path}from", "is missing, but there is 'role'", hint)
    name = text(turn, "from", within=path)
    role = _ROLES.get(name)
    if role is None:
        raise RowError(f"{path}from", f"is {name!r}", f"it must be one of {', '.join(_ROLES)}")
    supervision, reasoning = read_loss(turn, role, path), read_reasoning(turn, role, path)
    if name == "function_call":
        calls = read_calls(text(turn, "value", within=path), where=f"{path}value")
        return Message(role, "", tool_calls=calls, reasoning=reasoning, **supervision)
    # Tool results and system messages may be empty.
    may_be_empty = role in ("system", "tool") and turn.get("value") is not None
    content = (optional_text if may_be_empty else text)(turn, "value", within=path)
    return Message(role, content, reasoning=reasoning, **supervision)
