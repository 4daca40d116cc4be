"""Dialogues of an agent, whose answers also contain the results of tools (MSAgent-Bench)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from xtuner.data.formats._turns import TURN_KEYS, read_turns
from xtuner.data.formats.base import Format, conversation, items, listed
from xtuner.types import Conversation, Message, Row

_RESULT = re.compile(r"<\|startofexec\|>(.*?)<\|endofexec\|>", re.DOTALL)


def convert(row: Row) -> Conversation:
    """Read the turns; tool results become tool turns, which are not supervised."""
    turns = read_turns(items(listed(row, "conversations"), "conversations"), column="conversations")
    return conversation(
        [part for turn in turns for part in _parts(turn)],
        column="conversations",
    )


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
