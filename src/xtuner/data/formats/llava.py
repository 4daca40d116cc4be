"""Conversations about images, as LLaVA's data sets have them; rows without an image as well."""

from __future__ import annotations

from xtuner.data.formats.base import Format
from xtuner.data.formats.sharegpt import convert

FORMAT = Format(
    name="llava",
    description="Turns of human and gpt about images; image is a name, a list, or left out.",
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
    priority=-5,
)
