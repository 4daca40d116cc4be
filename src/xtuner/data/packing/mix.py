"""Choose which rows an epoch has, how often, and which are set aside, by their numbers alone."""

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
    """The rows of an epoch, in the order of the sources; a row that is used twice is there twice.

    Args:
        counts: usable rows of each source, at least 1; rows are numbered through all sources.
        repeats: how often each source is used; a fraction is a random part of it.
        weights: shares of the sources in an epoch of as many rows as all sources have.
        limit: most rows, drawn at random.
        seed: fixes what is drawn.
    """
    wanted = list(counts)
    if repeats is not None:
        wanted = [round(count * times) for count, times in zip(counts, repeats, strict=True)]
    elif weights is not None:
        shares = np.cumsum(weights) / np.sum(weights)
        edges = np.rint(shares * sum(counts)).astype(int)
        wanted = np.diff(edges, prepend=0).tolist()
    firsts = np.cumsum([0, *counts])
    parts = [
        first + _drawn(count, times, seed, number)
        for number, (first, count, times) in enumerate(zip(firsts, counts, wanted, strict=False))
    ]
    rows = np.concatenate(parts)
    if limit is not None and len(rows) > limit:
        rows = rows[order.subset(len(rows), limit, "limit", seed)]
    return rows


def _drawn(count: int, wanted: int, seed: int, source: int) -> Ints:
    """`wanted` of `count` rows: all of them as often as it goes, then a random part."""
    whole, rest = divmod(wanted, count)
    part = order.subset(count, rest, "mix", seed, source)
    return np.concatenate([np.tile(np.arange(count, dtype=np.int64), whole), part])


def set_aside(rows: Ints, *, ratio: float, seed: int) -> tuple[Ints, Ints]:
    """Part `rows` into those to train on and those to measure with, the latter once each.

    All repeats of a row are on the same side.
    """
    different = np.flatnonzero(np.bincount(rows))
    count = round(len(different) * ratio)
    if ratio and not count and len(different) > 1:
        count = 1
    aside = different[order.subset(len(different), count, "validation", seed)]
    is_aside = np.zeros(different[-1] + 1 if len(different) else 0, dtype=np.bool_)
    is_aside[aside] = True
    return rows[~is_aside[rows]], aside
