"""Dialogues of an agent, whose answers also contain the results of tools (MSAgent-Bench)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from typing import Any

from xtuner.data.formats._turns import TURN_KEYS, read_turns
from xtuner.data.formats.base import Format, RowError, conversation, items
from xtuner.types import Conversation, Message, Row

_RESULT = re.compile(r"<\|startofexec\|>(.*?)<\|endofexec\|>", re.DOTALL)


def convert(row: Row) -> Conversation:
    """Read the turns; tool results become tool turns, which are not supervised."""
    if isinstance(row.get("conversations"), str):
        row = {"conversations": _parse(row["conversations"])}
    turns = read_turns(items(row, "conversations"), column="conversations")
    return conversation(
        [part for turn in turns for part in _parts(turn)],
        column="conversations",
    )


def _parse(value: str) -> Any:
    """Parse a list that is stored as JSON or Python text."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RowError("conversations", "is text that is not a list", "write it as JSON")


def _parts(turn: Message) -> Iterator[Message]:
    if turn.role != "assistant" or turn.tool_calls:
        yield turn
        return
    reasoning = turn.reasoning
    for i, piece in enumerate(_RESULT.split(turn.content)):
        if i % 2:
            yield Message("tool", piece)
        elif piece.strip():
            yield Message("assistant", piece, loss=turn.loss, reasoning=reasoning)
            reasoning = ""


FORMAT = Format(
    name="msagent",
    description="Turns as text (JSON or Python) or a list; tool results become turns.",
    columns=("conversations",),
    example={
        "conversations": [
            {"from": "user", "value": "What is 2 + 3?"},
            {
                "from": "assistant",
                "value": "add(2, 3)<|startofexec|>5<|endofexec|>It is 5.",
            },
        ]
    },
    convert=convert,
    priority=-1,
    turn_keys={"conversations": TURN_KEYS},
)
