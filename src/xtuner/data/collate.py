"""Concatenate samples to one row, without padding and without loss across sequences."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from xtuner.types import IGNORE_INDEX, Batch, Sample


def concatenate(samples: Sequence[Sample]) -> Batch:
    """Concatenate `samples` to one batch, in order; see `Batch` for the shapes."""
    lengths = [length for sample in samples for length in sample.sequence_lengths]
    starts = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1:])
    input_ids = np.concatenate([sample.input_ids for sample in samples]).astype(
        np.int64, copy=False
    )
    mask = np.concatenate([sample.loss_mask for sample in samples])
    labels = np.where(mask, input_ids, IGNORE_INDEX)
    labels[starts[:-1]] = IGNORE_INDEX
    weights = None
    if any(sample.weights is not None for sample in samples):
        ones = (np.ones(len(sample.input_ids), np.float32) for sample in samples)
        weights = np.concatenate(
            [
                one if sample.weights is None else sample.weights
                for sample, one in zip(samples, ones, strict=True)
            ]
        )
    position_ids = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1], lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(starts),
        rows=tuple(sample.row for sample in samples),
        weights=None if weights is None else torch.from_numpy(weights)[None],
        sequences_per_row=len(samples[0].sequence_lengths) if samples else 1,
    )
