"""Frozen linear layers and their LoRA adapters as one operation (arXiv:2106.09685, equation 3).

    forward    h = drop(x) (s A)^T,       y = x W^T + b + h B^T
    backward   dh = dy B,                 dx = dy W + drop'(dh s A)
               dB = dy^T h,               dA = s dh^T drop(x)

Written out, it adds the adapter inside the matrix product, gives W no gradient, multiplies in the
type of the activations although A and B are stored in float32, and keeps no copy of a quantised W:
its values are made anew in the backward pass. Layers that take the same x (queries, keys and
values; gate and up) go together: one product with all their A, and one sum of their dx.

On a CPU that multiplies bfloat16 vectors all of it is two compiled calls (`cpu_low_rank`), but for
dropout, recomputation, odd sizes and adapters that are not in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xtuner.kernels import compiled
from xtuner.kernels.compiled import Kernels, kernels_for
from xtuner.kernels.four_bit import dequantized


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` of a linear layer in `dtype`; 4-bit weights are dequantised."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        whole: Tensor = weight.to(dtype)
        return whole
    return dequantized(weight.data, state).to(dtype)


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


def _kernels_for(x: Tensor, parts: Sequence[Adapted]) -> Kernels | None:
    """The compiled functions where they can take these layers."""
    kernels = kernels_for(x)
    there = kernels is not None and x.numel() and compiles(kernels, parts)
    return kernels if there else None


def compiles(kernels: Kernels, parts: Sequence[Adapted]) -> bool:
    """Whether the compiled functions can take layers of one input."""
    if len(parts) > compiled.lora_linear.MOST_PARTS or _recomputed():
        return False
    for part in parts:
        sizes = (*part.up.shape, part.down.shape[1])  # each is an inner dimension once
        wide = part.down.dtype == part.up.dtype == torch.float32
        if part.dropout or not wide or not all(kernels.multiplies(size) for size in sizes):
            return False
        if kernels_for(part.down, part.up) is None:
            return False
        state: Any = getattr(part.layer.weight, "quant_state", None)
        if state is not None and not compiled.lora_linear.reads(state):
            return False
    return True


def _recomputed() -> bool:
    """Whether a layer of a recomputing model runs, or runs again.

    There torch is slower, by 3 % with vectors and 11 to 14 % with tiles, but leaves fewer gaps in
    malloc's memory: 400 MiB of 1,500 in a run of 2,048 tokens, in which both held equally many
    tensors.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def layer_of(part: Adapted, dtype: torch.dtype) -> compiled.Layer:
    """A layer as the compiled functions take it."""
    weight: Any = part.layer.weight
    bias: Any = part.layer.bias
    state = getattr(weight, "quant_state", None)
    four = None if state is None else compiled.lora_linear.FourBits.of(state)
    weight = (weight.to(dtype) if state is None else weight).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    layer: compiled.Layer = compiled.lora_linear.Layer(
        weight, bias, part.down, part.up, part.scaling, four
    )
    return layer


class _CompiledLowRankLinears(torch.autograd.Function):
    """As `_LowRankLinears`, compiled."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Adapted], kernels: Kernels, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        layers = [layer_of(part, x.dtype) for part in parts]
        outs, inner = compiled.lora_linear.forward(kernels, rows, layers)
        ctx.save_for_backward(rows, inner, *adapters)  # these for autograd to see them changed
        ctx.parts, ctx.shape, ctx.kernels = parts, x.shape, kernels
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, inner, *_ = ctx.saved_tensors
        grad_x, grads_of_adapters = compiled.lora_linear.backward(
            ctx.kernels,
            rows,
            [layer_of(part, rows.dtype) for part in ctx.parts],
            inner,
            [grad.flatten(0, -2).contiguous() for grad in grads],
            grad_x=ctx.needs_input_grad[0],
        )
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, *grads_of_adapters)


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
        rows, dtype, count = x.flatten(0, -2), x.dtype, len(parts)
        scaled = rows.new_empty(sum(len(part.down) for part in parts), rows.shape[1])
        downs = scaled.split([len(part.down) for part in parts])
        for down, given, part in zip(downs, adapters, parts, strict=False):
            torch.mul(given, part.scaling, out=down)
        ups = [up.to(dtype) for up in adapters[count:]]
        masks = []
        if any(part.dropout for part in parts):
            dropped = [torch.native_dropout(rows, part.dropout, True) for part in parts]
            inners = [some @ down.T for (some, _), down in zip(dropped, downs, strict=True)]
            masks = [mask for _, mask in dropped]
        else:
            inners = list((rows @ scaled.T).split([len(down) for down in downs], dim=1))
        outs = []
        for part, inner, up in zip(parts, inners, ups, strict=True):
            bias: Any = part.layer.bias
            bias = None if bias is None else bias.to(dtype)
            out = F.linear(rows, frozen_weight(part.layer, dtype), bias)
            outs.append(out.addmm_(inner, up.T))
        ctx.save_for_backward(rows, scaled, *inners, *ups, *masks)
        ctx.parts, ctx.shape, ctx.types = parts, x.shape, [a.dtype for a in adapters]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Gradients of x, of all A and of all B."""
        parts, types, count = ctx.parts, ctx.types, len(ctx.parts)
        rows, scaled, *saved = ctx.saved_tensors
        inners, ups, masks = saved[:count], saved[count : 2 * count], saved[2 * count :]
        ranks = [len(part.down) for part in parts]
        grad_x = None
        grad_inners, grad_ups = [], []
        for part, grad, inner, up in zip(parts, grads, inners, ups, strict=True):
            pull = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                weight = frozen_weight(part.layer, rows.dtype)
                grad_x = pull @ weight if grad_x is None else grad_x.addmm_(pull, weight)
            grad_inners.append(pull @ up)
            grad_ups.append(pull.T @ inner)
        if masks:
            grad_downs = []
            downs = scaled.split(ranks)
            for part, g, down, mask in zip(parts, grad_inners, downs, masks, strict=True):
                kept = 1 / (1 - part.dropout) if part.dropout < 1 else 0.0
                grad_downs.append(g.T @ (rows * mask * kept))
                if grad_x is not None:
                    grad_x += torch.ops.aten.native_dropout_backward(g @ down, mask, kept)
        else:
            grad_inner = torch.cat(grad_inners, dim=1) if count > 1 else grad_inners[0]
            grad_downs = list((grad_inner.T @ rows).split(ranks))
            if grad_x is not None:
                grad_x.addmm_(grad_inner, scaled)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return (
            *(grad_x, None),
            *(g.to(t).mul_(p.scaling) for g, t, p in zip(grad_downs, types, parts, strict=False)),
            *(g.to(t) for g, t in zip(grad_ups, types[count:], strict=True)),
        )


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
    outs: tuple[Tensor, ...]
    kernels = _kernels_for(x, parts)
    if kernels is None:
        outs = _LowRankLinears.apply(x, parts, *adapters)  # type: ignore[no-untyped-call]
    else:
        outs = _CompiledLowRankLinears.apply(x, parts, kernels, *adapters)  # type: ignore[no-untyped-call]
    return outs
