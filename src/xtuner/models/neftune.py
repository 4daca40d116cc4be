"""NEFTune: uniform noise on input embeddings during training (arXiv:2310.05914, algorithm 1)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class EmbeddingNoise:
    """Adds noise to the output of `embedding` inside `of_row`, in training mode.

    Args:
        embedding: The input embedding of a model.
        alpha: In a sample of L tokens with embedding dimension d, noise is uniform from ``-alpha /
            sqrt(L d)`` to ``alpha / sqrt(L d)``.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self._cu_seqlens: Tensor | None = None
        self._share = slice(None)
        embedding.register_forward_hook(self._add)

    @contextlib.contextmanager
    def of_row(self, cu_seqlens: Tensor, share: slice = slice(None)) -> Iterator[None]:
        """Add noise to the tokens `share` of the row of samples that `cu_seqlens` delimits."""
        self._cu_seqlens, self._share = cu_seqlens, share
        try:
            yield
        finally:
            self._cu_seqlens = None

    def _add(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if self._cu_seqlens is None or not module.training:
            return None
        lengths = self._cu_seqlens.diff()
        bounds = self.alpha / (lengths * output.shape[-1]).float().sqrt()
        of_token = bounds.repeat_interleave(lengths.long())[self._share].to(output.device)
        if math.prod(output.shape[:-1]) != len(of_token):
            return None  # image rows are embedded in parts
        noise = torch.empty_like(output).uniform_(-1, 1)
        return output + noise * of_token.to(output.dtype).view(*output.shape[:-1], 1)
