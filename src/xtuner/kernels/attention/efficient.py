"""Memory-efficient attention over cumulative lengths, torch's for GPUs of any age."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.attention.call import (
    AMPERE,
    AttentionCall,
    Functions,
    Kernel,
    dotted,
    lacks,
    next_multiple,
    type_name,
)

CAUSAL = 1
"""`custom_mask_type`: a query sees the keys up to its own."""


class MemoryEfficient(Kernel):
    """For every NVIDIA GPU since Maxwell, and so for those without bfloat16; and for float32."""

    name = "memory-efficient attention over cu_seqlens (torch)"
    family = "memory-efficient attention"

    def __init__(self, functions: Functions):
        self._functions = functions

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """Heads of 16 bytes or multiples of it."""
        step = 4 if call.dtype == torch.float32 else 8
        return next_multiple(call.width, step), next_multiple(call.value_width, step)

    def refusal(self, call: AttentionCall) -> str:
        """By the type, and by what the functions of both directions take."""
        functions = self._functions
        if call.softcap is not None:
            return "has no soft cap"
        if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"takes 16 or 32 bits, not {type_name(call.dtype)}"
        if call.dtype == torch.bfloat16 and functions.capability < AMPERE:
            return f"takes no bfloat16 on compute capability {dotted(functions.capability)}"
        wanted = list(_factors(call))
        return lacks(functions.efficient, *wanted) or lacks(functions.efficient_backward, *wanted)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """With a gradient of our own."""
        options = cu_seqlens, longest, call, self._functions
        out: Tensor = _EfficientAttention.apply(query, key, value, *options)  # type: ignore[no-untyped-call]
        return out


class _EfficientAttention(torch.autograd.Function):
    """torch's own gradient of this operation forgets the window (its derivatives.yaml), so it is
    called here. Keys and values are repeated for all query heads inside, and kept as they came."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens: Tensor,
        longest: int,
        call: AttentionCall,
        functions: Functions,
    ) -> Tensor:
        q, k, v = _batch_of_one(query, key, value)
        lengths = cu_seqlens, cu_seqlens, longest, longest
        options = call.dropout, CAUSAL, any(ctx.needs_input_grad)
        results = functions.efficient(q, k, v, None, *lengths, *options, **_factors(call))
        out, sums, seed, offset = results[:4]
        ctx.save_for_backward(query, key, value, cu_seqlens, out, sums, seed, offset)
        ctx.rest = longest, call, functions
        return out[0]  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cu_seqlens, out, *state = ctx.saved_tensors
        longest, call, functions = ctx.rest
        sums, seed, offset = state
        q, k, v = _batch_of_one(query, key, value)
        lengths = cu_seqlens, cu_seqlens, longest, longest
        options = call.dropout, seed, offset, CAUSAL, False
        grads = functions.efficient_backward(
            grad_output[None], q, k, v, None, out, *lengths, sums, *options, **_factors(call)
        )
        grad_q, grad_k, grad_v = (x[0] for x in grads[:3])
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        if groups[1] > 1:
            grad_k, grad_v = (x.unflatten(1, groups).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None, None, None


def _factors(call: AttentionCall) -> dict[str, Any]:
    window = {} if call.window is None else {"window_size": call.window}
    return {"scale": call.scale, **window}


def _batch_of_one(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[1, N, heads, D]`` with as many heads of keys and values as of queries."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return q[None], k[None], v[None]
