"""Frozen linear layers of one input and their LoRA adapters as one compiled call per direction.

See ``lora_linear.c``. Use it through `kernels.lora.linear`, which checks whether it supports the
layers.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xtuner.kernels.cpu.bindings import FLAG, NUMBER, REAL, Kernels, address

MAX_LAYERS = 8
"""Maximum number of layers that share one input."""


class FourBits(ctypes.Structure):
    """`FourBits` of layout.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("code", "scales", "scale_code", "scale_indices")),
        *((name, NUMBER) for name in ("block", "group")),
        ("offset", REAL),
    )

    @classmethod
    def of(cls, state: Any) -> FourBits:
        """From the `QuantState` of bitsandbytes, which has to outlive the result."""
        if not state.nested:
            return cls(address(state.code), address(state.absmax), None, None, state.blocksize, 1)
        scales = state.state2
        pointers = map(address, (state.code, scales.absmax, scales.code, state.absmax))
        return cls(*pointers, state.blocksize, scales.blocksize, float(state.offset))


def reads(state: Any) -> bool:
    """Whether the compiled functions support a weight quantized by bitsandbytes."""
    if state.dtype == torch.float16 or state.blocksize % 32 or state.shape[-1] % state.blocksize:
        return False  # bitsandbytes rounds float16 twice and has its own CPU layout for odd rows
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
    """A layer for the compiled functions; tensors are contiguous.

    Attributes:
        weight: bfloat16 ``[out, in]``, or bytes with two 4-bit values each.
        bias: bfloat16 ``[out]``, or None.
        down: A of the adapter, float32 ``[rank, in]``.
        up: B of the adapter, float32 ``[out, rank]``.
        scaling: Factor of the adapter.
        four: The quantization of a 4-bit weight.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor
    scaling: float
    four: FourBits | None = None


class _Part(ctypes.Structure):
    """`Part` of lora_linear.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("four", ctypes.POINTER(FourBits)),
        *((name, ctypes.c_void_p) for name in ("bias", "plus", "down", "up", "y")),
        *((name, ctypes.c_void_p) for name in ("down_grad", "up_grad")),
        *((name, NUMBER) for name in ("out", "rank")),
        ("scale", REAL),
    )


class Linears(ctypes.Structure):
    """`Linears` of lora_linear.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "dx", "h")),
        *((name, NUMBER) for name in ("tokens", "width", "parts")),
        ("part", _Part * MAX_LAYERS),
    )

    def describe(self, tokens: int, layers: Sequence[Layer]) -> None:
        """Set the parameters of `layers`; pointers to inputs and outputs are set later."""
        self.tokens, self.width = tokens, layers[0].down.shape[1]
        self.parts = len(layers)
        for i, layer in enumerate(layers):
            four = None if layer.four is None else ctypes.pointer(layer.four)
            pointers = map(address, (layer.bias, None, layer.down, layer.up))
            sizes = *layer.up.shape, layer.scaling
            self.part[i] = _Part(address(layer.weight), four, *pointers, None, None, None, *sizes)

    def allocate_gradients(self, layers: Sequence[Layer]) -> list[Tensor]:
        """Allocate the gradients of all A and then all B."""
        downs = [torch.empty_like(layer.down) for layer in layers]
        ups = [torch.empty_like(layer.up) for layer in layers]
        for i, (down, up) in enumerate(zip(downs, ups, strict=True)):
            self.part[i].down_grad, self.part[i].up_grad = address(down), address(up)
        return [*downs, *ups]


def forward(kernels: Kernels, x: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], Tensor]:
    """Return the outputs ``[N, out]`` of each layer and the inner activations ``[N, ranks]``.

    Args:
        kernels: The bfloat16 functions.
        x: bfloat16 ``[N, in]``, contiguous.
        layers: At most `MAX_LAYERS`.
    """
    inner = x.new_empty(len(x), sum(len(layer.down) for layer in layers))
    outs = [x.new_empty(len(x), len(layer.up)) for layer in layers]
    call = ctypes.byref(_linears(x, layers, inner, outs))
    scratch = kernels.scratch("lora_linear_scratch_bytes", call, FLAG(False))
    kernels.call("lora_linear", call, scratch)
    return outs, inner


def backward(
    kernels: Kernels,
    x: Tensor,
    layers: Sequence[Layer],
    inner: Tensor,
    grad_outputs: Sequence[Tensor],
    *,
    grad_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of `x`, if `grad_x`, and of all A and then all B, the latter in float32.

    Args:
        kernels: As for `forward`.
        x: As for `forward`.
        layers: As for `forward`.
        inner: The inner activations returned by `forward`.
        grad_outputs: Gradients of the outputs, contiguous.
        grad_x: Whether `x` needs a gradient.
    """
    linears = _linears(x, layers, inner, grad_outputs)
    grads = linears.allocate_gradients(layers)
    out = torch.empty_like(x) if grad_x else None
    linears.dx = address(out)
    call = ctypes.byref(linears)
    scratch = kernels.scratch("lora_linear_scratch_bytes", call, FLAG(True))
    kernels.call("lora_linear_backward", call, scratch)
    return out, grads


def _linears(x: Tensor, layers: Sequence[Layer], inner: Tensor, outs: Sequence[Tensor]) -> Linears:
    linears = Linears(x=address(x), h=address(inner))
    linears.describe(len(x), layers)
    for i, out in enumerate(outs):
        linears.part[i].y = address(out)
    return linears
