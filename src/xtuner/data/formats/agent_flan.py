"""Turns with ``role``, ``content`` and ``loss``, and Thought, Action, Action Input (Agent-FLAN)."""

from __future__ import annotations

from collections.abc import Mapping

from xtuner.data.formats._react import read_react
from xtuner.data.formats._tools import read_tools
from xtuner.data.formats.base import Format, conversation, items
from xtuner.data.formats.openai import TURN_KEYS, read_messages
from xtuner.types import Conversation, Row


def convert(row: Row) -> Conversation:
    """Read the turns; actions become calls."""
    messages = read_messages(items(row, "conversation"), column="conversation")
    read, tools = read_react(messages, column="conversation")
    return conversation(read, tools=read_tools(row) or tools, column="conversation")


def _recognised(row: Row) -> bool:
    turns = row.get("conversation")
    first = turns[0] if isinstance(turns, list | tuple) and turns else None
    return isinstance(first, Mapping) and {"role", "content"} <= {*first}


FORMAT = Format(
    name="agent_flan",
    description="Messages in `conversation`; Action and Action Input become calls.",
    columns=("conversation",),
    example={
        "conversation": [
            {"role": "user", "content": "What day is it?", "loss": False},
            {"role": "assistant", "content": "Action: today\nAction Input: {}", "loss": True},
            {"role": "user", "content": "Response: Friday", "loss": False},
            {"role": "assistant", "content": "Final Answer: It is Friday.", "loss": True},
        ]
    },
    convert=convert,
    optional=("tools",),
    priority=2,
    by_row=True,
    recognise=_recognised,
    turn_keys={"conversation": TURN_KEYS},
)
