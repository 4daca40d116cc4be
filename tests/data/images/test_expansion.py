"""Images among tokens: expansion, and what is cut."""

import pytest
from data_makers import settings, write_jsonl
from image_makers import FixedImages

from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.data.build import build
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.models.vision.tower import add_image_token
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.testing.vision import tiny_images

EACH = 4


def built(folder, *, images, answer, max_length, **changes):
    own = tiny_tokenizer()
    image_layout = ImageLayout(ImageFolder(folder), add_image_token(own), FixedImages(EACH))
    row = {
        "image": tiny_images(folder, images),
        "conversations": [
            {"from": "human", "value": "<image>" * images + "?"},
            {"from": "gpt", "value": "x" * answer},
        ],
    }
    return build(
        settings(write_jsonl(folder / "d.jsonl", [row]), max_length=max_length, **changes),
        template=templates.load("auto", own), tokenizer=own, folder=folder, quiet=True,
        image_layout=image_layout, algorithm=Algorithm(),
    )  # fmt: skip


@pytest.mark.parametrize(("images", "text"), [(0, 100), (1, 96), (2, 92)])
def test_max_length_and_one_image_are_the_room_of_every_row(tmp_path, images, text):
    """As in docs/llava.md: 96 tokens with one image, 4 fewer with two, 4 more without."""
    wide = built(tmp_path, images=images, answer=10, max_length=400)
    frame = wide.train.num_tokens - images * EACH - 10
    for surplus in (0, 1):
        answer = text - frame + surplus
        data = built(tmp_path, images=images, answer=answer, max_length=96)
        changed = data.report.sources[0].changed
        assert [group.what for group in changed] == surplus * [
            "cut to 100 tokens (max_length = 96 tokens plus 4 for one image), so the model "
            "does not learn how they end: raise max_length"
        ]
