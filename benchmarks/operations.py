"""FLOPs that a training step needs, independent of the program, and the rate of the machine.

A multiply-add counts as two. A frozen matrix is used twice per token (forward, gradient of the
input), a trained one three times; attention takes six products over the unmasked pairs of tokens of
a sample; the output head is applied to supervised tokens only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Work:
    """The average cost of a token of a data set, in FLOPs."""

    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """FLOPs per token."""
        return self.body + self.attention + self.head


def needed(
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocabulary: int,
    lora_r: int | None,
    lengths: list[int],
    supervised: int,
) -> Work:
    """FLOPs per token of a decoder with gated MLPs; `lora_r` = None trains all weights.

    Args:
        lengths: length of each sample in tokens.
        supervised: supervised tokens in all samples.
    """
    shapes = [
        (hidden, heads * head_dim),
        (hidden, kv_heads * head_dim),
        (hidden, kv_heads * head_dim),
        (heads * head_dim, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    weights = layers * sum(a * b for a, b in shapes)
    if lora_r is None:
        body, head = 6.0 * weights, 6.0
    else:
        body, head = 4.0 * weights + 6.0 * layers * lora_r * sum(a + b for a, b in shapes), 4.0
    tokens = sum(lengths)
    pairs = sum(n * (n + 1) / 2 for n in lengths) / tokens
    return Work(
        body=body,
        attention=12.0 * layers * heads * head_dim * pairs,
        head=head * hidden * vocabulary * supervised / tokens,
    )


def matmul_rate(size: int = 2048, repeats: int = 12, dtype: torch.dtype = torch.bfloat16) -> float:
    """Median rate of a large matrix product in FLOP/s."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / sorted(seconds)[repeats // 2]
