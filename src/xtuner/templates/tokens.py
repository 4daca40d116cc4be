"""Tokenize text with hard boundaries at the start and end of assistant turns.

In a chat the prompt is tokenized first and the answer is generated token by token, so training
needs a token boundary exactly between them, whatever the tokenizer would merge. The text is
tokenized once and its ids are split at the boundaries by character offsets. Only where a token
crosses a boundary is the text cut: the part before is tokenized like the prompt of a chat, the part
after like its continuation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

_PROBE = " a  b\n 中"
_ANCHORS = ("\n", "a", ".")


class Tokens(Protocol):
    """Tokenizes text with boundaries at given positions."""

    def segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """Return ``len(cuts) + 1`` lists of ids, one for each segment between the cuts.

        The first k lists depend only on ``text[:cuts[k - 1]]``, so prompts are prefixes.

        Args:
            text: The text; no special tokens are added.
            cuts: Character positions in ascending order; equal ones give an empty list.
        """
        ...


def tokens_of(tokenizer: Any) -> Tokens:
    """The `Tokens` of a transformers tokenizer, using offsets if available."""
    return OffsetTokens(tokenizer) if tokenizer.is_fast else PrefixTokens(tokenizer)


class OffsetTokens:
    """For tokenizers with character offsets (all of the tokenizers library)."""

    def __init__(self, tokenizer: Any) -> None:
        self._core = tokenizer.backend_tokenizer
        offsets = self._core.encode(_PROBE, add_special_tokens=False).offsets
        if any(start == end for start, end in offsets):
            # A ByteLevel post-processor may trim spaces from offsets; it is not needed otherwise.
            self._core = type(self._core).from_str(self._core.to_str())
            self._core.post_processor = None
        self._anchors = self._find_anchors()

    def segments(self, text: str, cuts: Sequence[int]) -> list[list[int]]:
        """See `Tokens.segments`."""
        return self._split(text, cuts, continued=False)

    def _split(self, text: str, cuts: Sequence[int], *, continued: bool) -> list[list[int]]:
        done: list[list[int]] = []
        while True:
            if continued:
                ids, offsets = self._after_anchor(text)
            else:
                encoding = self._encoding(text)
                ids = encoding.ids
                if (fast := _token_boundaries(encoding, cuts, len(text), len(ids))) is not None:
                    return [ids[a:b] for a, b in pairwise([0, *fast, len(ids)])]
                offsets = encoding.offsets
            starts = [start for start, _ in offsets]
            positions = [bisect_left(starts, cut) for cut in cuts]
            crossed = (k for k, at in enumerate(positions) if at and offsets[at - 1][1] > cuts[k])
            first = next(crossed, None)
            if first is None:
                return done + [ids[a:b] for a, b in pairwise([0, *positions, len(ids)])]
            # Cutting here can make a token cross an earlier cut, so the text before is split again.
            cut = cuts[first]
            done += self._split(text[:cut], cuts[:first], continued=continued)
            text, cuts = text[cut:], [later - cut for later in cuts[first + 1 :]]
            continued = True

    def _after_anchor(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
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
        # Calling the tokenizer with truncation or padding leaves them enabled in its backend.
        if core.truncation is not None:
            core.no_truncation()
        if core.padding is not None:
            core.no_padding()
        return core.encode(text, add_special_tokens=False)

    def _find_anchors(self) -> tuple[str, ...]:
        """Strings to put before a continuation, if the tokenizer prepends a space to text."""
        alone = self._core.encode("ab", add_special_tokens=False).ids
        after = self._core.encode("\nab", add_special_tokens=False).ids
        return () if _ends_with(after, alone) else _ANCHORS


def _token_boundaries(
    encoding: Any, cuts: Sequence[int], size: int, count: int
) -> list[int] | None:
    """Index of the token that starts at each cut; None if a token crosses a cut.

    Looking up a few tokens is much faster than building the list of all offsets.
    """
    boundaries = []
    for cut in cuts:
        token = count if cut == size else encoding.char_to_token(cut)
        if token is None or (token < count and encoding.token_to_chars(token)[0] != cut):
            return None
        if token:
            start, end = encoding.token_to_chars(token - 1)
            if not start < end <= cut:
                return None
        boundaries.append(token)
    return boundaries


class PrefixTokens:
    """For tokenizers without offsets: tokenizes every prefix up to a cut, which is slower."""

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
