"""Turns with Thought, Action and Action Input, and results of functions (ToolBench)."""

from __future__ import annotations

from dataclasses import replace

from xtuner.data.formats import hermes
from xtuner.data.formats._react import is_action, read_react, values_in
from xtuner.data.formats._tools import read_tools
from xtuner.data.formats._turns import read_turns
from xtuner.data.formats.base import conversation, items, optional_text, system_turn
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Read the turns; actions become calls."""
    turns = read_turns(items(row, "conversations"), column="conversations")
    system = system_turn(optional_text(row, "system"))
    messages, tools = read_react([*system, *turns], column="conversations")
    return conversation(messages, tools=read_tools(row) or tools, column="conversations")


def _recognised(row: Row) -> bool:
    return any(map(is_action, values_in(row.get("conversations"))))


FORMAT = replace(
    hermes.FORMAT,
    name="toolbench",
    description="Turns with Thought, Action and Action Input, which become calls.",
    example={
        "conversations": [
            {"from": "user", "value": "What day is it?"},
            {"from": "assistant", "value": "Thought: Hm.\nAction: today\nAction Input: {}"},
            {"from": "function", "value": "Friday"},
            {"from": "assistant", "value": "It is Friday."},
        ]
    },
    convert=convert,
    recognise=_recognised,
)
