"""Turns of ``from`` and ``value``, with calls of functions and their results, and with images."""

from __future__ import annotations

from typing import Any

from xtuner.data.formats._images import read_names, share_out
from xtuner.data.formats._tools import read_tools
from xtuner.data.formats._turns import read_turns
from xtuner.data.formats.base import (
    Format,
    RowError,
    conversation,
    items,
    optional_text,
    parse_json,
    system_turn,
)
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Read the turns, and the system prompt, tools and images that may stand beside them.

    Images are not among the columns by which 'auto' knows the format, for `llava` is; but where
    rows of text come first, a later one may still have them.
    """
    column = "conversation" if row.get("conversations") is None and "conversation" in row else ""
    column = column or "conversations"
    if isinstance(row.get(column), str):  # a csv file holds lists as JSON text
        row = {**row, column: _listed(row[column], column)}
    turns = read_turns(items(row, column), column=column)
    system = system_turn(optional_text(row, "system"))
    if system and turns[0].role == "system":
        raise RowError("system", f"is there, and {column} begin with another", "keep one of them")
    if names := read_names(row, "image"):
        turns = share_out(turns, names, column=column)
    return conversation([*system, *turns], tools=read_tools(row), column=column)


def _listed(value: str, column: str) -> Any:
    try:
        return parse_json(value, where=column)
    except RowError as error:
        hint = "write it as JSON, or for Python lists set dataset_format = 'msagent'"
        raise RowError(column, error.problem, hint) from error


FORMAT = Format(
    name="sharegpt",
    description="Turns of human, gpt, function_call, observation; reads `conversation` too.",
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
)
