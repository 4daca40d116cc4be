"""Text to token ids with hard boundaries where the assistant begins and stops.

In a chat the prompt is tokenised first and the answer grows token by token behind it, so the ids of
training must have a border exactly there, whatever the tokenizer would merge. The whole text is
tokenised once and its ids are parted at the boundaries by their character offsets. Only where a
token reaches across a border is the text cut there: what stands before is tokenised as the prompt
of a chat is, what stands behind as its continuation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

_PROBE = " a  b\n 中"
_ANCHORS = ("\n", "a", ".")


class Tokens(Protocol):
    """Turns text into ids, parted at given places."""

    def segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """Return ``len(cuts) + 1`` lists of ids: the text between the cuts.

        The first k lists together depend on ``text[:cuts[k - 1]]`` alone: prompts are prefixes.

        Args:
            text: what to tokenise; no special tokens are added to it.
            cuts: character positions in rising order; equal ones give an empty list.
        """
        ...


def tokens_of(tokenizer: Any) -> Tokens:
    """The `Tokens` of a tokenizer of transformers, by offsets where it has them."""
    return OffsetTokens(tokenizer) if tokenizer.is_fast else PrefixTokens(tokenizer)


class OffsetTokens:
    """For tokenizers that know the characters of each token (all of the tokenizers library)."""

    def __init__(self, tokenizer: Any) -> None:
        self._core = tokenizer.backend_tokenizer
        offsets = self._core.encode(_PROBE, add_special_tokens=False).offsets
        if any(start == end for start, end in offsets):
            # A ByteLevel post-processor may trim spaces off the offsets; it has no other use here.
            self._core = type(self._core).from_str(self._core.to_str())
            self._core.post_processor = None
        self._anchors = self._find_anchors()

    def segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """See `Tokens.segments`."""
        return self._parted(text, cuts, continued=False)

    def _parted(self, text: str, cuts: Sequence[int], *, continued: bool) -> list[list[int]]:
        done: list[list[int]] = []
        while True:
            if continued:
                ids, offsets = self._behind_anchor(text)
            else:
                encoding = self._encoding(text)
                ids = encoding.ids
                if (plain := _plain_places(encoding, cuts, len(text), len(ids))) is not None:
                    return [ids[a:b] for a, b in pairwise([0, *plain, len(ids)])]
                offsets = encoding.offsets
            starts = [start for start, _ in offsets]
            places = [bisect_left(starts, cut) for cut in cuts]
            torn = (k for k, at in enumerate(places) if at and offsets[at - 1][1] > cuts[k])
            first = next(torn, None)
            if first is None:
                borders = [0, *places, len(ids)]
                return done + [ids[a:b] for a, b in pairwise(borders)]
            # This cut can make a token reach across an earlier one: look again before it.
            cut = cuts[first]
            done += self._parted(text[:cut], cuts[:first], continued=continued)
            text, cuts = text[cut:], [later - cut for later in cuts[first + 1 :]]
            continued = True

    def _behind_anchor(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        for anchor in self._anchors:
            size = len(anchor)
            encoding = self._encoding(anchor + text)
            ids, offsets = encoding.ids, encoding.offsets
            at = bisect_left([start for start, _ in offsets], size)
            if offsets[at - 1][1] <= size:
                return ids[at:], [(start - size, end - size) for start, end in offsets[at:]]
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str) -> Any:
        core = self._core
        # A call of the tokenizer with truncation or padding leaves them set on its core.
        if core.truncation is not None:
            core.no_truncation()
        if core.padding is not None:
            core.no_padding()
        return core.encode(text, add_special_tokens=False)

    def _find_anchors(self) -> tuple[str, ...]:
        """Texts to put before a continuation, if the tokenizer begins texts with a space."""
        alone = self._core.encode("ab", add_special_tokens=False).ids
        behind = self._core.encode("\nab", add_special_tokens=False).ids
        return () if _ends_with(behind, alone) else _ANCHORS


def _plain_places(encoding: Any, cuts: Sequence[int], size: int, count: int) -> list[int] | None:
    """Which of `count` tokens begins at each cut; None unless all are as plain as most are.

    Looking a few tokens up takes a fraction of the time that a list of all offsets does.
    """
    places = []
    for cut in cuts:
        token = count if cut == size else encoding.char_to_token(cut)
        if token is None or (token < count and encoding.token_to_chars(token)[0] != cut):
            return None
        if token:
            start, end = encoding.token_to_chars(token - 1)
            if not start < end <= cut:
                return None
        places.append(token)
    return places


class PrefixTokens:
    """For tokenizers without offsets: every text up to a cut is tokenised, which takes longer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchors = () if _ends_with(self._call("\nab"), self._call("ab")) else _ANCHORS

    def segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """See `Tokens.segments`."""
        done: list[list[int]] = []
        base, last = 0, 0
        before: list[int] = []
        for end in [*cuts, len(text)]:
            ids = self._encode(text[base:end], continued=base > 0)
            if ids[: len(before)] != before:
                base, before = last, []
                ids = self._encode(text[base:end], continued=base > 0)
            done.append(ids[len(before) :])
            before, last = ids, end
        return done

    def _encode(self, text: str, *, continued: bool) -> list[int]:
        for anchor in self._anchors if continued else ():
            head, ids = self._call(anchor), self._call(anchor + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self._call(text)

    def _call(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends_with(ids: list[int], tail: list[int]) -> bool:
    return bool(tail) and ids[-len(tail) :] == tail
