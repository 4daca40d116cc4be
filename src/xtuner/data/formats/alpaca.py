"""An instruction, an optional input, and the answer."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
    joined,
    optional_text,
    system_turn,
    text,
)
from xtuner.types import Conversation, Message, Row


def convert(row: Row) -> Conversation:
    """Use the instruction, followed by the input on the next line, after the history."""
    question = joined(text(row, "instruction"), optional_text(row, "input"))
    return conversation(
        [
            *system_turn(optional_text(row, "system")),
            *_history(row),
            Message("user", question),
            Message("assistant", text(row, "output")),
        ],
        column="output",
    )


def _history(row: Row) -> Iterator[Message]:
    if not row.get("history"):
        return
    for i, pair in enumerate(items(row, "history")):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{i}]", "is not a pair", "it must be [question, answer]")
        within = f"history[{i}]."
        turns = {"question": pair[0], "answer": pair[1]}
        yield Message("user", text(turns, "question", within=within))
        yield Message("assistant", text(turns, "answer", within=within))


FORMAT = Format(
    name="alpaca",
    description="Instruction, optional input, answer; history is [[question, answer], ...].",
    columns=("instruction", "output"),
    example={
        "instruction": "Name the colour.",
        "input": "a ripe lemon",
        "output": "Yellow.",
    },
    convert=convert,
    optional=("input", "system", "history"),
    priority=3,
)
