"""How pictures stand among tokens: room for them, and what is cut."""

import pytest
from data_makers import settings, write_jsonl

from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.data.build import build
from xtuner.data.images.expansion import Sight
from xtuner.data.images.files import PictureFolder
from xtuner.models.vision.tower import add_image_token
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.testing.vision import tiny_pictures

EACH = 4


def built(folder, *, pictures, answer, max_length, **changes):
    own = tiny_tokenizer()
    sight = Sight(PictureFolder(folder), add_image_token(own), EACH)
    row = {
        "image": tiny_pictures(folder, pictures),
        "conversations": [
            {"from": "human", "value": "<image>" * pictures + "?"},
            {"from": "gpt", "value": "x" * answer},
        ],
    }
    return build(
        settings(write_jsonl(folder / "d.jsonl", [row]), max_length=max_length, **changes),
        template=templates.load("auto", own), tokenizer=own, folder=folder, quiet=True, sight=sight,
        algorithm=Algorithm(),
    )  # fmt: skip


@pytest.mark.parametrize(("pictures", "text"), [(0, 100), (1, 96), (2, 92)])
def test_max_length_and_one_picture_are_the_room_of_every_row(tmp_path, pictures, text):
    """As docs/llava.md says: with max_length = 96, beside two 4 fewer, without one 4 more."""
    wide = built(tmp_path, pictures=pictures, answer=10, max_length=400)
    frame = wide.train.num_tokens - pictures * EACH - 10
    for surplus in (0, 1):
        answer = text - frame + surplus
        data = built(tmp_path, pictures=pictures, answer=answer, max_length=96)
        changed = data.report.sources[0].changed
        assert [group.what for group in changed] == surplus * [
            "cut to 100 tokens (max_length = 96 tokens and the 4 of a picture)"
        ]
