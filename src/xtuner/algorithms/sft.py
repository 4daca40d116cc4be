"""Supervised fine-tuning on the assistant turns of conversations."""

from xtuner.algorithms.base import BaseAlgorithm


class Algorithm(BaseAlgorithm):
    """Cross-entropy over the tokens of assistant turns."""
