"""Sizes of packed rows and of the graphs that accept them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Capacity:
    """What a graph accepts: exactly `tokens`, at most `sequences`, none longer than `longest`."""

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, tokens: int, sequences: int, longest: int) -> Capacity:
        """The capacity to record for a row: the next powers of two, so that few graphs are
        recorded."""
        return cls(tokens, max(8, _power(sequences)), min(tokens, max(128, _power(longest))))

    def holds(self, other: Capacity) -> bool:
        """Whether a row of size `other` fits."""
        fits = self.sequences >= other.sequences and self.longest >= other.longest
        return fits and self.tokens == other.tokens

    def joined(self, other: Capacity) -> Capacity:
        """The smallest capacity that covers both."""
        return Capacity(
            max(self.tokens, other.tokens),
            max(self.sequences, other.sequences),
            max(self.longest, other.longest),
        )


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def rounded(tokens: int) -> int:
    """The number of tokens that a row of `tokens` is padded to: at most a sixteenth more."""
    step = max(64, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Row:
    """A row for the decoder.

    Attributes:
        embeddings: ``[1, N, H]``.
        positions: int64 ``[1, N]``.
        cu_seqlens: int32 ``[S + 1]``, on the CPU.
        longest: Length of the longest sequence.
    """

    embeddings: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int

    @property
    def capacity(self) -> Capacity:
        """The capacity that this row needs."""
        return Capacity(self.embeddings.shape[1], len(self.cu_seqlens) - 1, self.longest)
