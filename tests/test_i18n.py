"""What pages say reads right for one thing and for several."""

import pytest

from xtuner import i18n


@pytest.mark.parametrize(
    ("key", "number", "expected"),
    [
        ("chat_rounds", 1, "Stopped after 1 round of calls;"),
        ("chat_rounds", 2, "Stopped after 2 rounds of calls;"),
        ("answers_left_out", 1, "1 more round of answers is in"),
        ("answers_left_out", 1200, "1,200 more rounds of answers are in"),
    ],
)
def test_number_is_followed_by_its_noun(key, number, expected):
    assert i18n.words("en")(key, rounds=number, count=number).startswith(expected)
    assert f"{number} 轮" in i18n.words("zh")(key, rounds=number, count=number)


def test_sizes_of_the_data():
    part = {"samples": 1, "tokens": 1234, "supervised": 900, "packs": 1, "fill": "50%"}
    assert i18n.words("en")("data_training", **part) == (
        "Training: 1 sample, 1,234 tokens (900 supervised) in 1 pack (50% full)."
    )
    assert "1 个样本，1,234 个 token，其中 900 个" in i18n.words("zh")("data_training", **part)
