"""Turns of input and output, the form of the first xtuner."""

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
    """Read the exchanges; the first may carry the system prompt."""
    messages: list[Message] = []
    for place, turn in objects(items(row, "conversation"), within="conversation"):
        if "input" not in turn and "from" in turn:
            hint = "set dataset_format = 'sharegpt'"
            raise RowError(f"{place}input", "is missing, there is 'from' in its place", hint)
        system = system_turn(optional_text(turn, "system", within=place))
        if system and messages:
            raise RowError(f"{place}system", "is in a later turn", "only the first may have one")
        messages += [*system, Message("user", text(turn, "input", within=place))]
        messages.append(Message("assistant", text(turn, "output", within=place)))
    return conversation(messages, column="conversation")


FORMAT = Format(
    name="xtuner",
    description="Exchanges of input and output, with a system prompt in the first.",
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
