"""Turns with ``from`` and ``value``, optionally with function calls, results and images."""

from __future__ import annotations

import json
from typing import Any

from xtuner.data.formats._images import read_names, share_out
from xtuner.data.formats._tools import read_tools
from xtuner.data.formats._turns import TURN_KEYS, read_turns
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
    """Read the turns, and the optional system prompt, tools and images.

    The column of images is not listed, so that 'auto' selects `llava` for it; but if the first rows
    of a file are text, later ones may still have images.
    """
    column = "conversation" if row.get("conversations") is None and "conversation" in row else ""
    column = column or "conversations"
    if isinstance(row.get(column), str):  # csv files store lists as JSON text
        row = {**row, column: _listed(row[column], column)}
    turns = read_turns(items(row, column), column=column)
    system = system_turn(optional_text(row, "system"))
    if system and turns[0].role == "system":
        raise RowError("system", f"is set, but {column} also begins with one", "keep one of them")
    if names := read_names(row, "image"):
        turns = share_out(turns, names, column=column)
    return conversation([*system, *turns], tools=read_tools(row), column=column)


def _listed(value: str, column: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        hint = "write it as JSON, or set dataset_format = 'msagent' for Python lists"
        raise RowError(column, "is not valid JSON", hint) from error


FORMAT = Format(
    name="sharegpt",
    description="Turns of human, gpt, function_call, observation; or in `conversation`.",
    columns=("conversations",),
    example={
        "conversations": [
            {"from": "human", "value": "What is the capital of France?"},
            {"from": "gpt", "value": "Paris."},
        ]
    },
    convert=convert,
    optional=("system", "tools"),
    aliases={"conversations": "conversation"},
    turn_keys={"conversations": TURN_KEYS, "conversation": TURN_KEYS},
    unlisted=("image",),
)
