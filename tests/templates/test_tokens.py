"""Ids with hard boundaries: by offsets, by prefixes, and as in a chat."""

import random

import pytest
from template_makers import byte_tokenizer, merging_tokenizer, space_tokenizer

from xtuner.templates import tokens as tokens_module
from xtuner.templates.tokens import OffsetTokens, PrefixTokens

TOKENIZERS = {
    "bytes": byte_tokenizer,
    "merging": merging_tokenizer,
    "trimmed": lambda: merging_tokenizer(trim_offsets=True),
    "space": space_tokenizer,
}
PIECES = [
    "Hello",
    " ",
    "\n",
    "\n\n",
    "<|im_end|>",
    "</s>",
    "ASSISTANT:",
    "你好",
    "🙂",
    "  more",
    "fine.",
]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def samples(count):
    draw = random.Random(0)
    for _ in range(count):
        pieces = draw.choices(PIECES, k=draw.randint(0, 12))
        text = "".join(pieces)
        yield text, sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 5)))


def test_offsets_and_prefixes_agree(tokenizer):
    fast, slow = OffsetTokens(tokenizer), PrefixTokens(tokenizer)
    for text, cuts in samples(300):
        assert fast.segments(text, cuts) == slow.segments(text, cuts), (text, cuts)


def test_looking_single_tokens_up_finds_what_all_offsets_say(tokenizer, monkeypatch):
    tokens = OffsetTokens(tokenizer)
    looked_up, answers = tokens_module._token_boundaries, []

    def watched(*args):
        answers.append(looked_up(*args))
        return answers[-1]

    monkeypatch.setattr(tokens_module, "_token_boundaries", watched)
    quick = [tokens.segments(text, cuts) for text, cuts in samples(300)]
    assert sum(answer is not None for answer in answers) > 60
    monkeypatch.setattr(tokens_module, "_token_boundaries", lambda *args: None)
    assert quick == [tokens.segments(text, cuts) for text, cuts in samples(300)]


def test_segments_before_a_cut_depend_on_the_text_before_it(tokenizer):
    tokens = OffsetTokens(tokenizer)
    for text, cuts in samples(200):
        whole = tokens.segments(text, cuts)
        for k, cut in enumerate(cuts):
            assert tokens.segments(text[:cut], cuts[:k]) == whole[: k + 1]


@pytest.mark.parametrize("make", [merging_tokenizer, space_tokenizer])
def test_ids_equal_those_of_the_entire_text_if_no_token_is_split(make):
    tokenizer = make()
    tokens = OffsetTokens(tokenizer)
    kept = changed = 0
    for text, cuts in samples(300):
        parted = [i for segment in tokens.segments(text, cuts) for i in segment]
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        if not any(start < cut < end for cut in cuts for start, end in encoding.offsets):
            kept += 1
            assert parted == encoding.ids
        changed += parted != encoding.ids
    assert kept > 50
    assert changed > 20


def test_offsets_without_their_spaces_are_not_trusted():
    plain, trimmed = merging_tokenizer(), merging_tokenizer(trim_offsets=True)
    tokens = OffsetTokens(plain), OffsetTokens(trimmed)
    for text, cuts in samples(100):
        assert tokens[0].segments(text, cuts) == tokens[1].segments(text, cuts)


def test_space_before_a_text_is_not_put_before_a_continuation():
    tokenizer = space_tokenizer()
    tokens = OffsetTokens(tokenizer)
    first, second = tokens.segments("fine", [2])
    assert tokenizer.convert_ids_to_tokens(first)[0].startswith("▁")
    assert not tokenizer.convert_ids_to_tokens(second)[0].startswith("▁")


def test_truncation_left_on_by_another_call_is_ignored():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    tokens = OffsetTokens(tokenizer)
    tokenizer("Hello there", truncation=True, max_length=3, padding="max_length")
    assert len(tokens.segments("Hello", [])[0]) == 5
