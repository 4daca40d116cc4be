"""A frozen linear layer and its LoRA adapter as one operation (arXiv:2106.09685, equation 3).

    forward    h = drop(x) (s A)^T,       y = x W^T + b + h B^T
    backward   dh = dy B,                 dx = dy W + drop'(dh s A)
               dB = dy^T h,               dA = s dh^T drop(x)

The explicit backward pass accumulates the adapter into the matrix product, computes no gradient of
W, multiplies in the dtype of the activations although A and B are stored in float32, and
dequantizes a quantized W again instead of saving a copy. Layers with the same x (queries, keys and
values; gate and up) run together: one product with all their A, and one sum of their dx.

On a CPU with bfloat16 products this is one compiled call per direction (`kernels.cpu.lora_linear`),
except with dropout, recomputation, odd sizes or adapters that are not float32.
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
    """The weight ``[out, in]`` of a linear layer in `dtype`; 4-bit weights are dequantized."""
    weight: Any = layer.weight
    state = getattr(weight, "quant_state", None)
    values: Tensor = weight if state is None else dequantized(weight.data, state)
    return values.to(dtype)


@dataclass(frozen=True)
class Adapted:
    """A frozen linear layer with one adapter.

    Attributes:
        layer: An `nn.Linear`, or bitsandbytes' `Linear4bit`; gets no gradient.
        down: A, ``[r, in]``, of any dtype.
        up: B, ``[out, r]``.
        scaling: s, ``alpha / r``.
        dropout: Probability that an input of the adapter is set to zero.
    """

    layer: nn.Module
    down: Tensor
    up: Tensor
    scaling: float
    dropout: float = 0.0


def _kernels_for(x: Tensor, parts: Sequence[Adapted]) -> Kernels | None:
    """The compiled functions, if they support these layers."""
    kernels = kernels_for(x)
    supported = kernels is not None and x.numel() and can_compile(kernels, parts)
    return kernels if supported else None


def can_compile(kernels: Kernels, parts: Sequence[Adapted]) -> bool:
    """Whether the compiled functions support these layers, which share one input."""
    if len(parts) > compiled.lora_linear.MAX_LAYERS or _in_checkpoint():
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


def _in_checkpoint() -> bool:
    """Whether the layer runs under activation checkpointing, in the first or the second pass.

    There torch is slower, by 3 % with AVX-512 and 11 to 14 % with AMX, but fragments the heap less:
    by 400 of 1,500 MiB in a run of 2,048 tokens with the same tensors.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def layer_of(part: Adapted, dtype: torch.dtype) -> compiled.Layer:
    """Convert a layer to the argument of the compiled functions."""
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


class _CompiledLoraLinears(torch.autograd.Function):
    """`_LoraLinears` with the compiled functions."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Adapted], kernels: Kernels, *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        layers = [layer_of(part, x.dtype) for part in parts]
        outs, inner = compiled.lora_linear.forward(kernels, rows, layers)
        ctx.save_for_backward(rows, inner, *adapters)  # autograd then detects in-place changes
        ctx.parts, ctx.shape, ctx.kernels = parts, x.shape, kernels
        return tuple(_shaped(out, x) for out in outs)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        rows, inner, *_ = ctx.saved_tensors
        grad_x, adapter_grads = compiled.lora_linear.backward(
            ctx.kernels,
            rows,
            [layer_of(part, rows.dtype) for part in ctx.parts],
            inner,
            [grad.flatten(0, -2).contiguous() for grad in grads],
            grad_x=ctx.needs_input_grad[0],
        )
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, *adapter_grads)


class _LoraLinears(torch.autograd.Function):
    """Map x ``[..., in]`` to ``[..., out]`` for each part.

    The A of all parts are stacked and multiplied at once, except with dropout, where each part has
    its own mask.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Adapted], *adapters: Tensor
    ) -> tuple[Tensor, ...]:
        """`adapters` are the A of all parts and then their B, passed so that autograd sees them."""
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
        return tuple(_shaped(out, x) for out in outs)

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
            grad_rows = grad.flatten(0, -2)
            if ctx.needs_input_grad[0]:
                weight = frozen_weight(part.layer, rows.dtype)
                grad_x = grad_rows @ weight if grad_x is None else grad_x.addmm_(grad_rows, weight)
            grad_inners.append(grad_rows @ up)
            grad_ups.append(grad_rows.T @ inner)
        if masks:
            grad_downs = []
            downs = scaled.split(ranks)
            for part, g, down, mask in zip(parts, grad_inners, downs, masks, strict=True):
                scale = 1 / (1 - part.dropout) if part.dropout < 1 else 0.0
                grad_downs.append(g.T @ (rows * mask * scale))
                if grad_x is not None:
                    grad_x += torch.ops.aten.native_dropout_backward(g @ down, mask, scale)
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


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """`rows` ``[T, out]`` as ``[..., out]`` of `x`. Autograd does not treat it as a view, which a
    model could not change in place (Gemma 3n scales a projection in place)."""
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return shaped


def lora_linears(x: Tensor, parts: Sequence[Adapted]) -> tuple[Tensor, ...]:
    """Return ``layer(x) + scaling * B A drop(x)`` of each part.

    Args:
        x: ``[..., in]``; cast to the autocast dtype if autocast is enabled.
        parts: Layers that all take `x`.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    adapters = (*(part.down for part in parts), *(part.up for part in parts))
    outs: tuple[Tensor, ...]
    kernels = _kernels_for(x, parts)
    if kernels is None:
        outs = _LoraLinears.apply(x, parts, *adapters)  # type: ignore[no-untyped-call]
    else:
        outs = _CompiledLoraLinears.apply(x, parts, kernels, *adapters)  # type: ignore[no-untyped-call]
    return outs
