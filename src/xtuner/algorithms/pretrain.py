"""Continued pretraining: learn every token of plain text.

The loss is that of `sft`; what differs is made in the data part, which marks every token but the
first as supervised and splits long texts instead of cutting them.
"""

from xtuner.algorithms.sft import Algorithm

__all__ = ["Algorithm"]
