"""A question, the calls that answer it, and the tools (xLAM function calling)."""

from __future__ import annotations

from xtuner.data.formats._tools import read_calls, read_tools
from xtuner.data.formats.base import Format, RowError, conversation, text
from xtuner.types import Conversation, Message, Row


def convert(row: Row) -> Conversation:
    """Read the question and its calls."""
    calls = read_calls(row.get("answers"), where="answers")
    if not calls:
        raise RowError("answers", "has no call", "remove the row")
    tools = read_tools(row)
    if not tools:
        raise RowError("tools", "has no tool", "add the tools that the answers call")
    messages = [Message("user", text(row, "query")), Message("assistant", "", tool_calls=calls)]
    return conversation(messages, tools=tools, column="answers")


FORMAT = Format(
    name="xlam",
    description="A question, its calls and the tools; lists may be JSON text.",
    columns=("query", "answers", "tools"),
    example={
        "query": "What day is it?",
        "answers": '[{"name": "today", "arguments": {}}]',
        "tools": '[{"name": "today", "parameters": {}}]',
    },
    convert=convert,
    optional=("id",),
)
