"""Dialogues as one text with role markers (timdettmers/openassistant-guanaco)."""

import re

from xtuner.data.formats.base import Format, RowError, conversation, text
from xtuner.types import Conversation, Message, Role, Row

_MARKER = re.compile(r"(?<!#)### (Human|Assistant):")
_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def convert(row: Row) -> Conversation:
    """Split the text at its markers, including the white space around them."""
    prefix, *pieces = _MARKER.split(text(row, "text"))
    if prefix.strip() or not pieces:
        hint = "for plain text set dataset_format = 'pretrain'"
        raise RowError("text", "does not begin with '### Human:'", hint)
    messages = []
    for speaker, content in zip(pieces[::2], pieces[1::2], strict=True):
        if not content.strip():
            raise RowError("text", f"has no text after '### {speaker}:'", "remove the row")
        messages.append(Message(_ROLES[speaker], content.strip()))
    return conversation(messages, column="text")


FORMAT = Format(
    name="oasst1",
    description="A dialogue in one text, with ### Human: and ### Assistant: before the turns.",
    columns=("text",),
    example={"text": "### Human: Are cats pets?### Assistant: Yes."},
    convert=convert,
    by_row=True,
)
