"""Causal attention of packed samples in one call of ``attention.c``, including the rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.cpu.bindings import Kernels, Rotation, Rows, readable


class _CompiledAttention(torch.autograd.Function):
    """Queries ``[N, heads, D]``, keys and values ``[N, kv_heads, D]`` to ``[N, heads, D]``."""

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


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    rows: Rows,
    kernels: Kernels,
) -> Tensor:
    """Causal attention within each sample of a packed row.

    Args:
        query: ``[N, heads, D]``.
        key: ``[N, kv_heads, D]``.
        value: As `key`.
        rotation: Cosines and sines, float32 ``[N, D]``, or None.
        rows: The attention pattern.
        kernels: The functions for the dtype of `query`; `kernels.attends(D)` is True.

    Returns:
        ``[N, heads, D]``.
    """
    out: Tensor = _CompiledAttention.apply(query, key, value, rotation, rows, kernels)  # type: ignore[no-untyped-call]
    return out
