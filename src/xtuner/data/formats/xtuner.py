"""Turns of input and output, the format of XTuner 0.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtuner.data.formats._supervision import LOSS_KEYS, Supervision, read_loss
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
        answer = text(turn, "output", within=path)
        messages.append(Message("assistant", answer, **_loss(turn, path)))
    return conversation(messages, column="conversation")


def _loss(turn: Mapping[str, Any], path: str) -> Supervision:
    """Read whether the answer is supervised; XTuner 0.1 names it `output_with_loss`."""
    value = turn.get("output_with_loss")
    if value is None:
        return read_loss(turn, "assistant", path)
    return read_loss({"loss": value}, "assistant", f"{path}output_with_")


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
    turn_keys={"conversation": ("input", "output", "system", "output_with_loss", *LOSS_KEYS)},
)
