"""A frozen linear layer and its LoRA adapter as one operation (arXiv:2106.09685, equation 3).

    forward    h = drop(x) A^T,           y = x W^T + b + h (s B)^T
    backward   dh = dy (s B),             dx = dy W + drop'(dh A)
               dB = s dy^T h,             dA = dh^T drop(x)

Written out, it adds the adapter inside the matrix product, gives W no gradient, multiplies in the
type of the activations although A and B are stored in float32, and keeps no copy of a quantised W:
its values are made anew in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of a linear layer in `dtype`; 4-bit weights are dequantised."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        whole: Tensor = weight.to(dtype)
        return whole
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)
    return values.to(dtype)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: nn.Module,
        down: Tensor,
        up: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """x ``[..., in]``, down = A ``[r, in]``, up = B ``[out, r]`` to ``[..., out]``."""
        rows, dtype = x.flatten(0, -2), x.dtype
        bias: Any = layer.bias
        out = F.linear(rows, frozen_weight(layer, dtype), None if bias is None else bias.to(dtype))
        dropped, mask = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        small_down, small_up = down.to(dtype), (up * scaling).to(dtype)
        inner = dropped @ small_down.T
        out.addmm_(inner, small_up.T)
        ctx.save_for_backward(rows, mask, inner, small_down, small_up)
        ctx.options = layer, scaling, dropout, x.shape, down.dtype, up.dtype
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, mask, inner, down, up = ctx.saved_tensors
        layer, scaling, dropout, shape, down_dtype, up_dtype = ctx.options
        grad, dtype = grad.flatten(0, -2), rows.dtype
        kept = 1 / (1 - dropout) if dropout < 1 else 0.0
        grad_inner = grad @ up
        grad_x = grad_down = grad_up = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ frozen_weight(layer, dtype)
            if mask is None:
                grad_x.addmm_(grad_inner, down)
            else:
                through = grad_inner @ down
                grad_x += torch.ops.aten.native_dropout_backward(through, mask, kept)
            grad_x = grad_x.view(shape)
        if ctx.needs_input_grad[2]:
            dropped = rows if mask is None else rows * mask * kept
            grad_down = (grad_inner.T @ dropped).to(down_dtype)
        if ctx.needs_input_grad[3]:
            grad_up = (grad.T @ inner).to(up_dtype).mul_(scaling)
        return grad_x, None, grad_down, grad_up, None, None


def low_rank_linear(
    x: Tensor, layer: nn.Module, down: Tensor, up: Tensor, *, scaling: float, dropout: float = 0.0
) -> Tensor:
    """Return ``layer(x) + scaling * B A drop(x)`` for a frozen linear `layer`.

    Args:
        x: ``[..., in]``; under autocast it is taken in autocast's type.
        layer: an `nn.Linear`, or bitsandbytes' `Linear4bit`; gets no gradient.
        down: A, ``[r, in]``, in any type.
        up: B, ``[out, r]``.
        scaling: ``alpha / r``.
        dropout: share of the adapter's inputs set to zero.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    out: Tensor = _LowRankLinear.apply(x, layer, down, up, scaling, dropout)  # type: ignore[no-untyped-call]
    return out
