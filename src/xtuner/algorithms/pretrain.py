"""Continued pretraining: learn every token of plain text.

The loss is that of supervised fine-tuning. Every token but the first of a row is supervised, and
long texts are split instead of cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from xtuner.algorithms.base import BaseAlgorithm
from xtuner.types import Encoded, Record, RecordEncoder


class Algorithm(BaseAlgorithm):
    """Cross-entropy over all tokens."""

    overlong = "split"
    overlong_choices = ("split", "truncate", "drop", "error")
    takes_images = False
    continues_text = True
    uncommon = ("SYSTEM",)

    def encode(self, record: Record, encoder: RecordEncoder) -> Sequence[Encoded]:
        """One sequence with every token but the first supervised."""
        (encoded,) = super().encode(record, encoder)
        ids = encoded.input_ids
        return [Encoded(ids, [False] + [True] * (len(ids) - 1))]
