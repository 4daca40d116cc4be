"""Frozen linear layers and their LoRA adapters as one operation (arXiv:2106.09685, equation 3).

    forward    h = s drop(x) A^T,         y = x W^T + b + h B^T
    backward   dh = s dy B,               dx = dy W + drop'(dh A)
               dB = dy^T h,               dA = dh^T drop(x)

Written out, it adds the adapter inside the matrix product, gives W no gradient, multiplies in the
type of the activations although A and B are stored in float32, and keeps no copy of a quantised W:
its values are made anew in the backward pass. Layers that take the same x (queries, keys and
values; gate and up) go together: one product with all their A, and one sum of their dx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer with one adapter.

    Attributes:
        layer: an `nn.Linear`, or bitsandbytes' `Linear4bit`; gets no gradient.
        down: A, ``[r, in]``, in any type.
        up: B, ``[out, r]``.
        scaling: s, ``alpha / r``.
        dropout: share of the adapter's inputs set to zero.
    """

    layer: nn.Module
    down: Tensor
    up: Tensor
    scaling: float
    dropout: float = 0.0


class _LowRankLinears(torch.autograd.Function):
    """x ``[..., in]`` to ``[..., out]`` of each part.

    The A of all parts stand one below the other and are multiplied at once. With dropout each part
    draws inputs of its own, and they stay apart.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Adapted], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """`adapters`: the A of all parts and then their B, named for autograd to see."""
        rows, dtype = x.flatten(0, -2), x.dtype
        downs, ups = ([a.to(dtype) for a in half] for half in _halves(adapters))
        masks = []
        if any(part.dropout for part in parts):
            dropped = [torch.native_dropout(rows, part.dropout, True) for part in parts]
            inners = [some @ down.T for (some, _), down in zip(dropped, downs, strict=True)]
            masks = [mask for _, mask in dropped]
        else:
            inners = list((rows @ torch.cat(downs).T).split([len(down) for down in downs], dim=1))
        outs = []
        for i, (part, up) in enumerate(zip(parts, ups, strict=True)):
            bias: Any = part.layer.bias
            bias = None if bias is None else bias.to(dtype)
            out = F.linear(rows, frozen_weight(part.layer, dtype), bias)
            inners[i] = inners[i] * part.scaling
            outs.append(out.addmm_(inners[i], up.T))
        ctx.save_for_backward(rows, *inners, *downs, *ups, *masks)
        ctx.parts, ctx.shape, ctx.types = parts, x.shape, [a.dtype for a in adapters]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of x, of all A and of all B."""
        count = len(ctx.parts)
        rows, *saved = ctx.saved_tensors
        inners, downs, ups = (saved[i * count : (i + 1) * count] for i in range(3))
        masks = saved[3 * count :]
        grad_x = None
        grad_inners, grad_ups = [], []
        for part, grad, inner, up in zip(ctx.parts, grads, inners, ups, strict=True):
            pull = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                weight = frozen_weight(part.layer, rows.dtype)
                grad_x = pull @ weight if grad_x is None else grad_x.addmm_(pull, weight)
            grad_inners.append((pull @ up).mul_(part.scaling))
            grad_ups.append(pull.T @ inner)
        if masks:
            grad_downs = []
            for part, g, down, mask in zip(ctx.parts, grad_inners, downs, masks, strict=True):
                kept = 1 / (1 - part.dropout) if part.dropout < 1 else 0.0
                grad_downs.append(g.T @ (rows * mask * kept))
                if grad_x is not None:
                    grad_x += torch.ops.aten.native_dropout_backward(g @ down, mask, kept)
        else:
            grad_inner = torch.cat(grad_inners, dim=1)
            grad_downs = list((grad_inner.T @ rows).split([len(down) for down in downs]))
            if grad_x is not None:
                grad_x.addmm_(grad_inner, torch.cat(downs))
        grad_adapters = zip((*grad_downs, *grad_ups), ctx.types, strict=True)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, *(grad.to(dtype) for grad, dtype in grad_adapters)


def _halves(adapters: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return adapters[: len(adapters) // 2], adapters[len(adapters) // 2 :]


def low_rank_linears(x: Tensor, parts: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """Return ``layer(x) + scaling * B A drop(x)`` of each part.

    Args:
        x: ``[..., in]``; under autocast it is taken in autocast's type.
        parts: layers that all take `x`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    adapters = (*(part.down for part in parts), *(part.up for part in parts))
    outs: tuple[Tensor, ...] = _LowRankLinears.apply(x, parts, *adapters)  # type: ignore[no-untyped-call]
    return outs
