"""Turns of input and output, the format of XTuner 0.1."""

from __future__ import annotations

from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
    objects,
    optional_text,
    system_turn,
    text,
)
from xtuner.types import Conversation, Message, Row


def convert(row: Row) -> Conversation:
    """Read the turns; the first may have a system prompt."""
    messages: list[Message] = []
    for path, turn in objects(items(row, "conversation"), within="conversation"):
        if "input" not in turn and "from" in turn:
            hint = "set dataset_format = 'sharegpt'"
            raise RowError(f"{path}input", "is missing, but there is 'from'", hint)
        system = system_turn(optional_text(turn, "system", within=path))
        if system and messages:
            raise RowError(f"{path}system", "is in a later turn", "only the first may have one")
        messages += [*system, Message("user", text(turn, "input", within=path))]
        messages.append(Message("assistant", text(turn, "output", within=path)))
    return conversation(messages, column="conversation")


FORMAT = Format(
    name="xtuner",
    description="Turns of input and output; the first may have a system prompt.",
    columns=("conversation",),
    example={
        "conversation": [
            {"system": "You answer briefly.", "input": "Are cats pets?", "output": "Yes."},
            {"input": "And tigers?", "output": "No."},
        ]
    },
    convert=convert,
    priority=1,
)
