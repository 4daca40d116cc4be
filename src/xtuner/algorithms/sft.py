"""Supervised fine-tuning: learn what the assistant says, given what came before."""

from xtuner.algorithms.base import BaseAlgorithm


class Algorithm(BaseAlgorithm):
    """Cross-entropy over the tokens that the template marks as the assistant's."""
