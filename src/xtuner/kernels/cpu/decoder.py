"""A decoder layer with LoRA on all its linear layers as one compiled call each way on a CPU.

See ``decoder.c``. `fused_decoder` tells which layers are such.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xtuner.kernels.cpu.bindings import (
    FLAG,
    REAL,
    Kernels,
    Packed,
    Rotation,
    Rows,
    address,
    packed,
)
from xtuner.kernels.cpu.lora_linear import Layer as Linear
from xtuner.kernels.cpu.lora_linear import Linears


class Layer(NamedTuple):
    """What a decoder layer is made of; tensors are contiguous.

    Attributes:
        norms: weights ``[H]`` of the norms before attention and before the gated product.
        eps: what they add to the mean of squares.
        groups: linear layers: queries, keys and values; the output of attention; gate and up; down.
        rows: who sees whom.
        rotation: cosines and sines, float32 ``[N, D]``.
        heads: how many heads of queries, how many of keys, and their width.
    """

    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    groups: Sequence[Sequence[Linear]]
    rows: Rows
    rotation: Rotation
    heads: tuple[int, int, int]

    def adapters(self) -> list[Tensor]:
        """All A and all B of each group, in the order of their gradients."""
        pairs = [([p.down for p in group], [p.up for p in group]) for group in self.groups]
        return [tensor for downs, ups in pairs for tensor in (*downs, *ups)]


class Call(ctypes.Structure):
    """`Decoder` of decoder.c."""

    _fields_ = (
        ("norm", ctypes.c_void_p * 2),
        ("eps", REAL * 2),
        *((name, Linears) for name in ("qkv", "output", "gates", "down")),
        ("rows", Packed),
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "dx", "saved")),
    )

    def linears(self) -> tuple[Linears, ...]:
        """Its linear layers, group by group."""
        return self.qkv, self.output, self.gates, self.down


def forward(kernels: Kernels, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Call]:
    """Output ``[N, H]`` for ``x [N, H]``, and for `backward` what it needs, as bytes, and the call.

    Args:
        kernels: those of bfloat16.
        x: bfloat16, contiguous.
        layer: the layer.
    """
    out, call = torch.empty_like(x), _structure(x, layer)
    place = ctypes.byref(call)
    saved = x.new_empty(kernels.measure("decoder_saved", place), dtype=torch.uint8)
    call.out, call.saved = address(out), address(saved)
    kernels.call("decoder", place, kernels.room("decoder_room", place, FLAG(False)))
    return out, saved, call


def backward(
    kernels: Kernels,
    x: Tensor,
    layer: Layer,
    saved: Tensor,
    call: Call,
    grad: Tensor,
    *,
    grad_x: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """Gradients of `x`, if `grad_x`, and of all A and all B of each group, these in float32.

    Args:
        kernels: as for `forward`, like `x` and `layer`.
        x: its input.
        layer: the layer.
        saved: what `forward` gave.
        call: that, too.
        grad: gradient of its output, contiguous.
        grad_x: whether `x` needs one.
    """
    grads = []
    call.norm[:] = [address(norm) for norm in layer.norms]  # all may have been away meanwhile
    for linears, group in zip(call.linears(), layer.groups, strict=True):
        linears.describe(len(x), group)
        grads += linears.give_gradients(group)
    out = torch.empty_like(x) if grad_x else None
    call.x, call.saved, call.grad, call.dx = map(address, (x, saved, grad, out))
    place = ctypes.byref(call)
    kernels.call("decoder_backward", place, kernels.room("decoder_room", place, FLAG(True)))
    return out, grads


def _structure(x: Tensor, layer: Layer) -> Call:
    call = Call(x=address(x))
    call.norm[:] = [address(norm) for norm in layer.norms]
    call.eps[:] = layer.eps
    for linears, group in zip(call.linears(), layer.groups, strict=True):
        linears.describe(len(x), group)
    call.rows = packed(layer.rows, layer.rotation, len(x), *layer.heads)
    return call
