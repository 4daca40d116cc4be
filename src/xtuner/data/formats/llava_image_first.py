"""Like `llava`, with the image at the start of its turn, as in XTuner 0.x and LLaVA."""

from __future__ import annotations

from dataclasses import replace

from xtuner.data.formats import llava
from xtuner.data.formats.sharegpt import convert as as_written
from xtuner.types import IMAGE, Conversation, Message, Row


def convert(row: Row) -> Conversation:
    """Read the turns, and move a turn's single image to its start."""
    record = as_written(row)
    return replace(record, messages=tuple(_image_first(message) for message in record.messages))


def _image_first(message: Message) -> Message:
    if message.role != "user" or message.content.count(IMAGE) != 1:
        return message
    text = message.content.replace(IMAGE, "").strip()
    return replace(message, content=f"{IMAGE}\n{text}".strip())


FORMAT = replace(
    llava.FORMAT,
    name="llava_image_first",
    description="Like llava, with the image moved to the start of its turn.",
    convert=convert,
    priority=-6,
)
