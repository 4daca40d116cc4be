"""The random state of every micro-step, as a pure function of its position in the run."""

from __future__ import annotations


def micro_seed(seed: int, step: int, index: int, rank: int) -> int:
    """A separate seed for every micro-step: splitmix64 over the four counters."""
    state = seed
    for number in (step, index, rank):
        state = (state * 0x9E3779B97F4A7C15 + number + 1) & (2**64 - 1)
        state ^= state >> 30
        state = (state * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state ^= state >> 27
    return state
