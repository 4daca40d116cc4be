"""Conversations about pictures, as LLaVA's data sets have them; rows without a picture as well."""

from __future__ import annotations

from xtuner.data.formats._images import read_names, share_out
from xtuner.data.formats._turns import read_turns
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
    optional_text,
    system_turn,
)
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Read the turns and give each ``<image>`` in them its picture."""
    misspelt = row.get("conversations") is None and "conversation" in row
    column = "conversation" if misspelt else "conversations"
    turns = read_turns(items(row, column), column=column)
    system = system_turn(optional_text(row, "system"))
    if system and turns[0].role == "system":
        raise RowError("system", f"is there, and {column} begin with another", "keep one of them")
    if names := read_names(row, "image"):
        turns = share_out(turns, names, column=column)
    return conversation([*system, *turns], column=column)


FORMAT = Format(
    name="llava",
    description="Turns of human and gpt about pictures; image is a name, a list, or left out.",
    columns=("conversations",),
    example={
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the bus?"},
            {"from": "gpt", "value": "The bus is white and red."},
        ],
    },
    convert=convert,
    optional=("image", "system"),
    aliases={"conversations": "conversation"},
    priority=-5,
)
