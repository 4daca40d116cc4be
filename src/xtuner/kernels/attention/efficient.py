"""torch's variable-length memory-efficient attention, which also supports older GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.device.select import name_of
from xtuner.kernels.attention.call import (
    AMPERE,
    AttentionCall,
    Functions,
    Kernel,
    dotted,
    lacks,
    next_multiple,
)

CAUSAL = 1
"""The causal value of `custom_mask_type`."""


class MemoryEfficient(Kernel):
    """Supports every NVIDIA GPU since Maxwell, including those without bfloat16, and float32."""

    name = "varlen memory-efficient attention (torch)"
    family = "memory-efficient attention"

    def __init__(self, functions: Functions):
        self._functions = functions

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """Multiples of 16 bytes."""
        step = 4 if call.dtype == torch.float32 else 8
        return next_multiple(call.width, step), next_multiple(call.value_width, step)

    def refusal(self, call: AttentionCall) -> str:
        """Check the dtype and the arguments of the forward and backward functions."""
        functions = self._functions
        if call.softcap is not None:
            return "does not support softcap"
        if call.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"supports float16, bfloat16 and float32, not {name_of(call.dtype)}"
        if call.dtype == torch.bfloat16 and functions.capability < AMPERE:
            capability = dotted(functions.capability)
            return f"does not support bfloat16 on compute capability {capability}"
        wanted = list(_factors(call))
        return lacks(functions.efficient, *wanted) or lacks(functions.efficient_backward, *wanted)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """Use `_EfficientAttention` for the gradient."""
        options = cu_seqlens, longest, call, self._functions
        out: Tensor = _EfficientAttention.apply(query, key, value, *options)  # type: ignore[no-untyped-call]
        return out


class _EfficientAttention(torch.autograd.Function):
    """Memory-efficient attention with the correct gradient: torch's derivatives.yaml omits the
    window. Keys and values are repeated for the query heads here, and saved unrepeated."""

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
    """``[1, N, heads, D]``, with keys and values repeated for each query head."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    return q[None], k[None], v[None]
