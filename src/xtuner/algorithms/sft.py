"""Supervised fine-tuning: learn what the assistant says, given what came before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtuner.data.collate import lay_out
from xtuner.types import Batch, LossOutput, Sample


class Algorithm:
    """Cross-entropy, summed over the tokens that the template marked as the assistant's."""

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Lay samples end to end."""
        return lay_out(samples)

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Return the summed cross-entropy of `batch`; `model` is a `PackedCausalLM`."""
        return LossOutput(model.supervised_loss(batch))
