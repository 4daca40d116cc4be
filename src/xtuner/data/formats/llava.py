"""Conversations about images, as in LLaVA's data sets; rows without images are allowed."""

from __future__ import annotations

from xtuner.data.formats._turns import TURN_KEYS
from xtuner.data.formats.base import Format
from xtuner.data.formats.sharegpt import convert

FORMAT = Format(
    name="llava",
    description="Turns of human and gpt about images; image is a name, a list, or absent.",
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
    priority=-5,
)
