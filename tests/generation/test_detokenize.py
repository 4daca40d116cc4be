import pytest

from xtuner.generation.detokenize import Detokenizer, StopWords
from xtuner.testing.tiny import tiny_tokenizer

TEXT = "Grüße, 你好 🤗! <b>"


def pieces_of(text: str) -> list[str]:
    tokenizer = tiny_tokenizer()
    growing = Detokenizer(tokenizer)
    return [growing.add(token_id) for token_id in tokenizer(text)["input_ids"]]


def test_characters_are_never_split() -> None:
    pieces = pieces_of(TEXT)
    assert len(pieces) == len(TEXT.encode())
    assert [piece for piece in pieces if piece] == list(TEXT)


def test_a_character_cut_at_the_end_is_left_out() -> None:
    tokenizer = tiny_tokenizer()
    growing = Detokenizer(tokenizer)
    shown = [growing.add(token_id) for token_id in tokenizer("ok 你")["input_ids"][:-1]]
    assert "".join(shown) + growing.rest() == "ok "


def test_bytes_that_are_no_character_do_not_stop_the_text() -> None:
    tokenizer = tiny_tokenizer()
    lone = tokenizer("你")["input_ids"][0]
    growing = Detokenizer(tokenizer)
    ids = [lone, *tokenizer("abc")["input_ids"]]
    assert "".join(growing.add(i) for i in ids) == "�abc"


def test_special_tokens_have_no_text() -> None:
    assert "".join(pieces_of("a<|im_end|>b")) == "ab"


@pytest.mark.parametrize(
    ("words", "text", "shown"),
    [
        (("STOP",), "go STOP on", "go "),
        (("STOP",), "go STO", "go STO"),
        (("abac",), "xababac!", "xab"),
        (("###", "\n\n"), "one\ntwo ## three\n\nfour###", "one\ntwo ## three"),
        (("aab", "ab"), "caab", "c"),
        ((), "all of it", "all of it"),
    ],
)
def test_nothing_of_a_stop_word_is_shown(words: tuple[str, ...], text: str, shown: str) -> None:
    for size in (1, 2, 3, len(text)):
        gate = StopWords(words)
        passed = [gate.add(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(passed) + gate.rest() == shown
        assert gate.found == (shown != text)


def test_text_is_held_back_no_longer_than_needed() -> None:
    gate = StopWords(["</answer>"])
    assert [gate.add(c) for c in ("a", "<", "b", "</", "x")] == ["a", "", "<b", "", "</x"]
