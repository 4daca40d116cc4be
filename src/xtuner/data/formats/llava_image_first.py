"""Like `llava`, with the image at the start of its turn, as in XTuner 0.x and LLaVA."""

from __future__ import annotations

from dataclasses import replace

from xtuner.data.formats._turns import TURN_KEYS
from xtuner.data.formats.base import Format
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


FORMAT = Format(
    name="llava_image_first",
    description="Like llava, with the image moved to the start of its turn.",
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
    turn_keys={"conversations": TURN_KEYS, "conversation": TURN_KEYS},
    priority=-6,
)
