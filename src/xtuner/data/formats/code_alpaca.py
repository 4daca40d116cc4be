"""Prompts and completions: texts (HuggingFaceH4/CodeAlpaca_20K), or lists of messages (TRL)."""

from dataclasses import replace

from xtuner.data.formats._tools import read_tools
from xtuner.data.formats.base import Format, RowError, conversation, items, listed, text
from xtuner.data.formats.openai import TURN_KEYS, read_messages
from xtuner.types import Conversation, Message, Role, Row


def convert(row: Row) -> Conversation:
    """Use the prompt as the question; in lists of messages, only the completion is supervised."""
    prompt = [
        replace(message, loss=False) if message.role == "assistant" else message
        for message in _messages(row, "prompt", "user")
    ]
    completion = _messages(row, "completion", "assistant")
    if completion[0].role != "assistant":
        hint = "it must begin with the assistant's turn"
        raise RowError("completion[0].role", f"is {completion[0].role!r}", hint)
    return conversation([*prompt, *completion], tools=read_tools(row), column="completion")


def _messages(row: Row, column: str, role: Role) -> list[Message]:
    if isinstance(row.get(column), str) and row[column].lstrip().startswith(("[{", "[ {")):
        try:
            return read_messages(items(listed(row, column), column), column=column)
        except RowError:  # a text that begins like a list
            return [Message(role, text(row, column))]
    if isinstance(row.get(column), list | tuple):
        return read_messages(items(row, column), column=column)
    return [Message(role, text(row, column))]


FORMAT = Format(
    name="code_alpaca",
    description="A prompt and its completion, as texts or lists of messages.",
    columns=("prompt", "completion"),
    example={"prompt": "Print hi in Python.", "completion": 'print("hi")'},
    convert=convert,
    optional=("tools",),
    turn_keys={"prompt": TURN_KEYS, "completion": TURN_KEYS},
)
