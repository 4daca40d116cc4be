"""Dialogues of moss-003-sft, with thoughts, commands and results of tools."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

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


def convert(row: Row) -> Conversation:
    """Read the turns in the order of their numbers."""
    chat = row.get("chat")
    if not isinstance(chat, Mapping):
        problem = f"is {kind(chat)}" if "chat" in row else "is missing"
        raise RowError("chat", problem, "it must be an object with turn_1, turn_2, ...")
    messages = [*system_turn(optional_text(row, "meta_instruction"))]
    # A table of rows with different numbers of turns fills the missing turns with null.
    turns = {_number(name): turn for name, turn in chat.items() if turn is not None}
    for number in sorted(turns):
        messages += _exchange(turns[number], f"chat.turn_{number}")
    return conversation(messages, column="chat")


def _number(name: str) -> int:
    number = name.removeprefix("turn_")
    if not number.isdecimal():
        raise RowError(f"chat.{name}", "is not a turn", "name the turns turn_1, turn_2, ...")
    return int(number)


def _exchange(turn: Any, where: str) -> Iterator[Message]:
    if not isinstance(turn, Mapping):
        raise RowError(where, f"is {kind(turn)}", "it must be an object")
    within = f"{where}."
    yield Message("user", _required(turn, "Human", within))
    thoughts = (_optional(turn, part, within) for part in ("Inner Thoughts", "Commands"))
    before, results = joined(*thoughts), _optional(turn, "Tool Responses", within)
    answer = _required(turn, "MOSS", within)
    if not results:
        yield Message("assistant", joined(before, answer))
        return
    if not before:
        raise RowError(f"{within}Commands", "is empty, but there are Tool Responses", "fill it in")
    yield Message("assistant", before)
    yield Message("tool", results)
    yield Message("assistant", answer)


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
    description="Numbered turns with role markers in the text, which are removed.",
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
