"""Frozen linear layers of one input and their LoRA adapters as one compiled call each way on a CPU.

See ``cpu_low_rank.c``. Callers go to `low_rank`, which comes here where the layers fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtuner.models.cpu_kernels import FLAG, NUMBER, REAL, Kernels, address

MOST_PARTS = 8
"""How many layers of one input go together at most."""


class Layer(NamedTuple):
    """A layer as the compiled functions take it; tensors are contiguous.

    Attributes:
        weight: bfloat16 ``[out, in]``.
        bias: bfloat16 ``[out]``, or None.
        down: A of its adapter, float32 ``[rank, in]``.
        up: B, float32 ``[out, rank]``.
        scaling: factor of the adapter.
        plus: bfloat16 ``[N, out]``, added to the output, or None.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float
    plus: Tensor | None = None


class _Part(ctypes.Structure):
    """`Part` of cpu_low_rank.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "plus", "down", "up", "y")),
        *((name, ctypes.c_void_p) for name in ("down_grad", "up_grad")),
        *((name, NUMBER) for name in ("out", "rank")),
        ("scale", REAL),
    )


class _Linears(ctypes.Structure):
    """`Linears` of cpu_low_rank.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dx", "h")),
        *((name, NUMBER) for name in ("tokens", "in", "parts")),
        ("part", _Part * MOST_PARTS),
    )


def forward(kernels: Kernels, x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """Outputs ``[N, out]`` of each layer, and what their adapters hold inside, ``[N, ranks]``.

    Args:
        kernels: those of bfloat16.
        x: bfloat16 ``[N, in]``, contiguous.
        layers: `MOST_PARTS` at most.
    """
    inner = x.new_empty(len(x), sum(len(layer.down) for layer in layers))
    outs = [x.new_empty(len(x), len(layer.weight)) for layer in layers]
    linears = _structure(x, layers, inner, outs)
    room = kernels.room("low_rank_room", linears, FLAG(False))
    kernels.call("low_rank", linears, room)
    return outs, inner


def backward(
    kernels: Kernels,
    x: Tensor,
    layers: Sequence[Layer],
    inner: Tensor,
    pulls: Sequence[Tensor],
    *,
    grad_x: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of `x`, if `grad_x`, of all A and of all B, these in float32.

    Args:
        kernels: as for `forward`, like `x` and `layers`.
        x: its input.
        layers: its layers.
        inner: what it gave.
        pulls: gradients of the outputs, contiguous.
        grad_x: whether `x` needs one.
    """
    downs = [torch.empty_like(layer.down) for layer in layers]
    ups = [torch.empty_like(layer.up) for layer in layers]
    out = torch.empty_like(x) if grad_x else None
    linears = _structure(x, layers, inner, pulls, out, downs, ups)
    room = kernels.room("low_rank_room", linears, FLAG(True))
    kernels.call("low_rank_backward", linears, room)
    return out, downs, ups


def _structure(
    x: Tensor,
    layers: Sequence[Layer],
    inner: Tensor,
    outs: Sequence[Tensor],
    grad_x: Tensor | None = None,
    downs: Sequence[Tensor] = (),
    ups: Sequence[Tensor] = (),
) -> Any:
    parts = (_Part * MOST_PARTS)()
    for i, (layer, out) in enumerate(zip(layers, outs, strict=True)):
        tensors = (layer.weight, layer.bias, layer.plus, layer.down, layer.up, out)
        grads = [some[i] for some in (downs, ups) if some]
        places = [address(tensor) for tensor in (*tensors, *grads)] + [None] * (2 - len(grads))
        parts[i] = _Part(*places, *layer.up.shape, layer.scaling)
    places = [address(tensor) for tensor in (x, grad_x, inner)]
    return ctypes.byref(_Linears(*places, *x.shape, len(layers), parts))
