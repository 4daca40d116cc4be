"""As `llava`, with each image before the words of its turn, where XTuner 0.x and LLaVA put it."""

from __future__ import annotations

from dataclasses import replace

from xtuner.data.formats.base import Format
from xtuner.data.formats.sharegpt import convert as as_written
from xtuner.types import IMAGE, Conversation, Message, Row


def convert(row: Row) -> Conversation:
    """Read the turns, and move the image of a turn that has one to its beginning."""
    read = as_written(row)
    return replace(read, messages=tuple(_image_first(message) for message in read.messages))


def _image_first(message: Message) -> Message:
    if message.role != "user" or message.content.count(IMAGE) != 1:
        return message
    words = message.content.replace(IMAGE, "").strip()
    return replace(message, content=f"{IMAGE}\n{words}".strip())


FORMAT = Format(
    name="llava_image_first",
    description="As llava, with the image of a turn moved before its words.",
    columns=("conversations",),
    example={
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is the bus?"},
            {"from": "gpt", "value": "The bus is white and red."},
        ],
    },
    convert=convert,
    optional=("image", "system", "tools"),
    aliases={"conversations": "conversation"},
    priority=-6,
)
