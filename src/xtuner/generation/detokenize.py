"""Incremental detokenization of a streamed answer.

id ──Detokenizer──► text of complete characters ──StopWords──► text to show
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

_HALF = "�"
"""The replacement character, to which an incomplete UTF-8 sequence decodes."""


class Detokenizer:
    """Convert ids to text one by one; a character is returned when all its bytes have arrived.

    Special tokens are left out, except those in `keep`, such as the ones that mark tool calls.
    """

    def __init__(self, tokenizer: Any, *, keep: Collection[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._kept = _special(tokenizer, keep) if keep else {}
        self._ids: list[int] = []
        self._context = 0  # ids from here on are decoded: a token's text depends on earlier ones
        self._shown = 0  # the text of ids before this index was returned

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; often empty for byte tokens."""
        if token_id in self._kept:
            before = self.rest()
            self._ids, self._context, self._shown = [], 0, 0
            return before + self._kept[token_id]
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(_HALF):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """The remaining text, without an incomplete character at the end."""
        return self._new_text().rstrip(_HALF)

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)


def _special(tokenizer: Any, words: Collection[str]) -> dict[int, str]:
    """Those of `words` that are special tokens, by id."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {tokenizer.convert_tokens_to_ids(word): word for word in words}
    return {i: word for i, word in ids.items() if i in special}


class StopWords:
    """Pass on text up to, and excluding, the first stop word.

    Text that may be the beginning of a stop word is held back until this is decided.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = tuple(word for word in words if word)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Return the part of the held back text and `text` that can be shown."""
        if self.found:
            return ""
        self._held += text
        starts = [at for word in self._words if (at := self._held.find(word)) >= 0]
        if starts:
            self.found = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._num_open())

    def rest(self) -> str:
        """The held back text, at the end of the answer."""
        return "" if self.found else self._release(len(self._held))

    def _num_open(self) -> int:
        """Number of characters at the end that may begin a stop word."""
        longest = max((len(word) for word in self._words), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-size:]) for word in self._words):
                return size
        return 0

    def _release(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        return shown
