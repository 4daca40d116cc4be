"""Random orders that are pure functions of their key; no global random state is read or changed.

The numbers come from SplitMix64 (Steele, Lea and Flood 2014), so that an order stays the same on
every machine and with every version of numpy: a resumed run sees what the straight run saw.
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
    """The numbers 0 to n - 1 in an order that depends on `n` and `key` alone."""
    return np.argsort(_noise(n, key), kind="stable").astype(np.int64, copy=False)


def subset(n: int, k: int, *key: int | str) -> Ints:
    """`k` of the numbers 0 to n - 1, ascending; they depend on `n`, `k` and `key` alone."""
    return np.sort(permutation(n, *key)[:k])


def _noise(n: int, key: tuple[int | str, ...]) -> npt.NDArray[np.uint64]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.frombuffer(digest, dtype="<u8")[0] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        noise: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return noise
