"""Select the rows of an epoch and of the validation set, by row numbers alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xtuner.data.packing import order
from xtuner.data.packing.order import Ints


def mixed_rows(
    counts: Sequence[int],
    *,
    repeats: Sequence[float] | None,
    weights: Sequence[float] | None,
    limit: int | None,
    seed: int,
) -> Ints:
    """The row numbers of an epoch, in the order of the sources; repeated rows occur repeatedly.

    Args:
        counts: Usable rows of each source, at least 1; rows are numbered across all sources.
        repeats: How often each source is used; a fraction selects a random part of it.
        weights: Shares of the sources in an epoch with as many rows as all sources together.
        limit: Maximum number of rows, drawn at random.
        seed: Determines the random draws.
    """
    targets = list(counts)
    if repeats is not None:
        targets = [round(count * times) for count, times in zip(counts, repeats, strict=True)]
    elif weights is not None:
        shares = np.cumsum(weights) / np.sum(weights)
        edges = np.rint(shares * sum(counts)).astype(int)
        targets = np.diff(edges, prepend=0).tolist()
    firsts = np.cumsum([0, *counts])
    parts = [
        first + _drawn(count, target, seed, number)
        for number, (first, count, target) in enumerate(zip(firsts, counts, targets, strict=False))
    ]
    rows = np.concatenate(parts)
    if limit is not None and len(rows) > limit:
        rows = rows[order.subset(len(rows), limit, "limit", seed)]
    return rows


def _drawn(count: int, target: int, seed: int, source: int) -> Ints:
    """Draw `target` of `count` rows: all of them repeatedly, then a random part."""
    repeats, rest = divmod(target, count)
    part = order.subset(count, rest, "mix", seed, source)
    return np.concatenate([np.tile(np.arange(count, dtype=np.int64), repeats), part])


def split_validation(rows: Ints, *, ratio: float, seed: int) -> tuple[Ints, Ints]:
    """Split `rows` into training and validation rows, the latter without repeats.

    All repeats of a row are on the same side.
    """
    unique = np.flatnonzero(np.bincount(rows))
    count = round(len(unique) * ratio)
    if ratio and not count and len(unique) > 1:
        count = 1
    validation = unique[order.subset(len(unique), count, "validation", seed)]
    is_validation = np.zeros(unique[-1] + 1 if len(unique) else 0, dtype=np.bool_)
    is_validation[validation] = True
    return rows[~is_validation[rows]], validation
