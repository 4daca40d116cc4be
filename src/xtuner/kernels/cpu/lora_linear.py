"""Frozen linear layers of one input and their LoRA adapters as one compiled call each way on a CPU.

See ``low_rank.c``. Callers go to `low_rank`, which comes here where the layers fit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtuner.kernels.cpu.bindings import FLAG, NUMBER, REAL, Kernels, address

MOST_PARTS = 8
"""How many layers of one input go together at most."""


class FourBits(ctypes.Structure):
    """`FourBits` of layout.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "scales", "scale_code", "scale_places")),
        *((name, NUMBER) for name in ("block", "group")),
        ("offset", REAL),
    )

    @classmethod
    def of(cls, state: Any) -> FourBits:
        """How to read a weight that bitsandbytes quantised, from its `QuantState`, which has to
        stay."""
        if not state.nested:
            return cls(address(state.code), address(state.absmax), None, None, state.blocksize, 1)
        scales = state.state2
        places = map(address, (state.code, scales.absmax, scales.code, state.absmax))
        return cls(*places, state.blocksize, scales.blocksize, float(state.offset))


def reads(state: Any) -> bool:
    """Whether the compiled functions can take a weight that bitsandbytes quantised as it is."""
    if state.dtype == torch.float16 or state.blocksize % 32 or state.shape[-1] % state.blocksize:
        return False  # bitsandbytes rounds the first twice, and reads the last otherwise on a CPU
    if state.code.dtype != torch.float32 or getattr(state, "packing_format_for_cpu", False):
        return False
    if not state.nested:
        return bool(state.absmax.dtype == torch.float32)
    scales = state.state2
    return bool(
        state.absmax.dtype == torch.uint8
        and scales.absmax.dtype == scales.code.dtype == torch.float32
    )


class Layer(NamedTuple):
    """A layer as the compiled functions take it; tensors are contiguous.

    Attributes:
        weight: bfloat16 ``[out, in]``, or bytes of two numbers each.
        bias: bfloat16 ``[out]``, or None.
        down: A of its adapter, float32 ``[rank, in]``.
        up: B, float32 ``[out, rank]``.
        scaling: factor of the adapter.
        four: how to read a weight of four bits.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float
    four: FourBits | None = None


class _Part(ctypes.Structure):
    """`Part` of low_rank.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("four", ctypes.POINTER(FourBits)),
        *((name, ctypes.c_void_p) for name in ("bias", "plus", "down", "up", "y")),
        *((name, ctypes.c_void_p) for name in ("down_grad", "up_grad")),
        *((name, NUMBER) for name in ("out", "rank")),
        ("scale", REAL),
    )


class Linears(ctypes.Structure):
    """`Linears` of low_rank.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dx", "h")),
        *((name, NUMBER) for name in ("tokens", "width", "parts")),
        ("part", _Part * MOST_PARTS),
    )

    def describe(self, tokens: int, layers: Sequence[Layer]) -> None:
        """Set what `layers` are made of; where their inputs and outputs lie comes later."""
        self.tokens, self.width = tokens, layers[0].down.shape[1]
        self.parts = len(layers)
        for i, layer in enumerate(layers):
            four = None if layer.four is None else ctypes.pointer(layer.four)
            places = map(address, (layer.bias, None, layer.down, layer.up))
            sizes = *layer.up.shape, layer.scaling
            self.part[i] = _Part(address(layer.weight), four, *places, None, None, None, *sizes)

    def give_gradients(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Make room for the gradients of all A, and then of all B."""
        downs = [torch.empty_like(layer.down) for layer in layers]
        ups = [torch.empty_like(layer.up) for layer in layers]
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            self.part[i].down_grad, self.part[i].up_grad = address(down), address(up)
        return [*downs, *ups]


def forward(kernels: Kernels, x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """Outputs ``[N, out]`` of each layer, and what their adapters hold inside, ``[N, ranks]``.

    Args:
        kernels: those of bfloat16.
        x: bfloat16 ``[N, in]``, contiguous.
        layers: `MOST_PARTS` at most.
    """
    inner = x.new_empty(len(x), sum(len(layer.down) for layer in layers))
    outs = [x.new_empty(len(x), len(layer.up)) for layer in layers]
    call = ctypes.byref(_linears(x, layers, inner, outs))
    kernels.call("low_rank", call, kernels.room("low_rank_room", call, FLAG(False)))
    return outs, inner


def backward(
    kernels: Kernels,
    x: Tensor,
    layers: Sequence[Layer],
    inner: Tensor,
    pulls: Sequence[Tensor],
    *,
    grad_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of `x`, if `grad_x`, and of all A and then all B, these in float32.

    Args:
        kernels: as for `forward`, like `x` and `layers`.
        x: its input.
        layers: its layers.
        inner: what it gave.
        pulls: gradients of the outputs, contiguous.
        grad_x: whether `x` needs one.
    """
    linears = _linears(x, layers, inner, pulls)
    grads = linears.give_gradients(layers)
    out = torch.empty_like(x) if grad_x else None
    linears.dx = address(out)
    call = ctypes.byref(linears)
    kernels.call("low_rank_backward", call, kernels.room("low_rank_room", call, FLAG(True)))
    return out, grads


def _linears(x: Tensor, layers: Sequence[Layer], inner: Tensor, outs: Sequence[Tensor]) -> Linears:
    linears = Linears(x=address(x), h=address(inner))
    linears.describe(len(x), layers)
    for i, out in enumerate(outs):
        linears.part[i].y = address(out)
    return linears
