"""Pad packed rows to round numbers of tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional as F

from xtuner.types import IGNORE_INDEX, Batch

LONG_ROW = 512
"""Rows of this many tokens or more are filled up to a multiple of 64; shorter ones to a multiple of
16."""


def missing_to_round(count: int, parts: int = 1) -> int:
    """Tokens added to a row of `count`, so that each of `parts` has a round number."""
    return -count % (parts * (64 if count >= LONG_ROW * parts else 16))


def filled(
    batch: Batch, *, tokens: int | None = None, longest: int | None = None, parts: int = 1
) -> Batch:
    """Pad `batch` with one more sample, without loss, if N is not a round number.

    The matrix library compiles code for every new N, and is a few percent slower if N is not
    a multiple of 16; so packs that are nearly full all get the same size.

    Args:
        batch: A packed row.
        tokens: N of the result; None takes the next round number.
        longest: Maximum tokens of an added sample; several are added if necessary. None adds one.
        parts: Number of processes that share the row; each gets the same number of tokens.
    """
    count = batch.num_tokens
    missing = missing_to_round(count, parts) if tokens is None else tokens - count
    if not missing:
        return batch
    starts = range(0, missing, longest or missing)
    added = torch.arange(missing, device=batch.position_ids.device)
    if longest:
        added %= longest
    positions = torch.cat([batch.position_ids, added[None]], dim=1)
    ends = torch.tensor([*(count + n for n in starts[1:]), count + missing], dtype=torch.int32)
    images = batch.images and replace(
        batch.images,
        mask=F.pad(batch.images.mask, (0, missing)),
        counts=(*batch.images.counts, *(0 for _ in starts)),
    )
    return Batch(
        input_ids=F.pad(batch.input_ids, (0, missing)),
        labels=F.pad(batch.labels, (0, missing), value=IGNORE_INDEX),
        position_ids=positions,
        cu_seqlens=torch.cat([batch.cu_seqlens, ends]),
        images=images,
        weights=None if batch.weights is None else F.pad(batch.weights, (0, missing)),
    )
