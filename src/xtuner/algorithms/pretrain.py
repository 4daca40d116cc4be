"""Continued pretraining on plain text.

The loss is that of supervised fine-tuning. Every token of a row except the first is supervised, and
long texts are split instead of truncated.
"""

from __future__ import annotations

from collections.abc import Sequence

from xtuner.algorithms.base import BaseAlgorithm
from xtuner.types import Conversation, Encoded, Record, RecordEncoder


class Algorithm(BaseAlgorithm):
    """Cross-entropy over all tokens."""

    overlong = "split"
    overlong_choices = ("split", "truncate", "drop", "error")
    takes_images = False
    continues_text = True
    uncommon = ("SYSTEM",)

    def encode(self, record: Record, encoder: RecordEncoder) -> Sequence[Encoded]:
        """Encode a row to one sequence; every token except the first is supervised."""
        match record:
            case Conversation():
                ids = encoder.conversation(record).input_ids
            case _:
                (encoded,) = super().encode(record, encoder)
                ids = encoded.input_ids
        return [Encoded(ids, [False] + [True] * (len(ids) - 1))]
