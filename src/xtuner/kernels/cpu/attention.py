"""Causal attention of packed samples on a CPU.

Where the CPU multiplies bfloat16 vectors and there is a compiler, a whole layer's attention is one
call of ``attention.c``, rotation included; else it goes in blocks (`block_attention`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.block_attention import Rotation, block_attention, kernels_for_rows, readable
from xtuner.kernels.cpu.bindings import Kernels, Rows

rows_of = lru_cache(maxsize=8)(Rows)


class _CompiledAttention(torch.autograd.Function):
    """``[N, heads, D]`` and twice ``[N, kv_heads, D]`` to ``[N, heads, D]``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None,
        rows: Rows,
        kernels: Kernels,
    ) -> Tensor:
        query, key, value = readable(query), readable(key), readable(value)
        out, logs = kernels.attention(query, key, value, rotation, rows)
        ctx.save_for_backward(query, key, value, out, logs)
        ctx.options = rotation, rows, kernels
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out, logs = ctx.saved_tensors
        rotation, rows, kernels = ctx.options
        grads = kernels.attention_backward(
            grad.contiguous(), query, key, value, rotation, rows, out, logs
        )
        return (*grads, None, None, None)


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row; arguments as for `block_attention`."""
    kernels = kernels_for_rows(query, key, value)
    same = query.shape[2] == key.shape[2] == value.shape[2]
    if kernels is not None and same and kernels.attends(query.shape[2]):
        rows = rows_of(borders, window, scale)
        out: Tensor = _CompiledAttention.apply(query, key, value, rotation, rows, kernels)  # type: ignore[no-untyped-call]
        return out
    return block_attention(
        query, key, value, borders, scale=scale, window=window, rotation=rotation
    )
