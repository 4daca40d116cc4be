"""Compares an attention function over packed samples with the plain formula, on fixed inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ROUNDINGS = 4
"""Tolerance in roundings of the dtype (`torch.finfo.eps`), for the relative root mean square
error."""


def distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of ``a - b``, relative to that of `b`; 0 only if all bits are equal."""
    a, b = a.detach().float(), b.detach().float()
    scale = float(b.norm())
    return float((a - b).norm()) / scale if scale else float(a.norm() > 0)


@torch.no_grad()
def wrong_attention(name: str, *, width: int, device: torch.device, dtype: torch.dtype) -> str:
    """What the attention function `name` over `cu_seqlens` computes wrongly; '' if nothing.

    Args:
        name: Name in transformers' attention interface.
        width: Head dimension.
        device: The model's device.
        dtype: The dtype of its matmuls.
    """
    function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
    cu_seqlens = torch.tensor([0, 6, 16], dtype=torch.int32)
    q, k, v = (
        torch.sin(torch.arange(n * 16 * width) * 12.9898 + n).view(1, n, 16, width)
        for n in (4, 2, 2)
    )
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    layer = nn.Module()
    layer.is_causal = True  # type: ignore[assignment]
    layer.num_key_value_groups = 2  # type: ignore[assignment]
    for window in (None, 3):
        found, _ = function(
            *(layer, q, k, v, None),
            scaling=width**-0.5,
            sliding_window=window,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=10,
            max_length_k=10,
        )
        off = distance(found[0], _attention_by_formula(q, k, v, cu_seqlens, window))
        if off > ROUNDINGS * torch.finfo(dtype).eps:
            within = "" if window is None else f" within a window of {window} tokens"
            return f"attention{within} differs from the formula by {off:.2g}"
    return ""


def _attention_by_formula(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None
) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` in float32, ``[N, heads, D]``."""
    q, k, v = (x[0].float() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    count = torch.arange(q.shape[1], device=q.device)
    sample = torch.bucketize(count, cu_seqlens.to(q.device)[1:], right=True)
    back = count[:, None] - count
    seen = (back >= 0) & (sample[:, None] == sample)
    seen &= back < (len(count) if window is None else window)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out: Tensor = (weights @ v).transpose(0, 1)
    return out
