"""Random orders that are pure functions of a key; no global random state is read or changed.

The random numbers come from SplitMix64 (Steele, Lea and Flood 2014), so an order is the same on
every machine and with every version of numpy, and a resumed run sees the same data.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def permutation(n: int, *key: int | str) -> Ints:
    """The numbers 0 to n - 1 in an order that depends only on `n` and `key`."""
    return np.argsort(_noise(n, key), kind="stable").astype(np.int64, copy=False)


def subset(n: int, k: int, *key: int | str) -> Ints:
    """`k` of the numbers 0 to n - 1, ascending; they depend only on `n`, `k` and `key`."""
    if not k:
        return np.zeros(0, dtype=np.int64)
    return np.sort(permutation(n, *key)[:k])


WINDOW = 64
"""Micro-batches that are sorted by length together: enough for similar lengths, few enough to keep
an epoch in random order."""


def grouped(
    drawn: Ints,
    has_images: npt.NDArray[np.bool_],
    lengths: Ints,
    *,
    size: int,
    key: tuple[int | str, ...],
) -> Ints:
    """Reorder `drawn` into groups of `size` with the same modality and similar length.

    The remainders of both modalities, less than `size` each, are at the end and may share a group.

    Args:
        drawn: Numbers in random order.
        has_images, lengths: Modality and length of every number.
        size: Size of a group.
        key: Key of the random order of the groups.
    """
    groups, rest = [], []
    for modality in (True, False):
        same = drawn[has_images[drawn] == modality]
        end = len(same) // size * size
        rest.append(same[end:])
        for start in range(0, end, WINDOW * size):
            window = same[start : min(start + WINDOW * size, end)]
            by_length = window[np.argsort(lengths[window], kind="stable")]
            groups += list(by_length.reshape(-1, size))
    mixed = [groups[i] for i in permutation(len(groups), *key)]
    return np.concatenate([*mixed, *rest])


def _noise(n: int, key: tuple[int | str, ...]) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.frombuffer(digest, dtype="<u8")[0] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        noise: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return noise
