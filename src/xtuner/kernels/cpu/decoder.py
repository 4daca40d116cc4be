"""A decoder layer with LoRA on all linear layers as one compiled call per direction on a CPU.

See ``decoder.c``. `kernels.fused.decoder` selects the layers.
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
    """The parameters of a decoder layer; tensors are contiguous.

    Attributes:
        norms: Weights ``[H]`` of the norms before attention and before the MLP.
        eps: Epsilon of the norms.
        groups: Linear layers: queries, keys and values; the output of attention; gate and up; down.
        rows: The attention pattern.
        rotation: Cosines and sines, float32 ``[N, D]``.
        heads: Number of query heads, number of key heads, and head size.
    """

    norms: tuple[Tensor, Tensor]
    eps: tuple[float, float]
    groups: Sequence[Sequence[Linear]]
    rows: Rows
    rotation: Rotation
    heads: tuple[int, int, int]

    def adapters(self) -> list[Tensor]:
        """All A and then all B of each group, in the order of the gradients."""
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
        """The linear layers by group."""
        return self.qkv, self.output, self.gates, self.down


def forward(kernels: Kernels, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Call]:
    """Return the output ``[N, H]`` for ``x [N, H]``, and saved bytes and the call for `backward`.

    Args:
        kernels: The bfloat16 functions.
        x: bfloat16, contiguous.
    """
    out, call = torch.empty_like(x), _structure(x, layer)
    pointer = ctypes.byref(call)
    saved = x.new_empty(kernels.measure("decoder_saved", pointer), dtype=torch.uint8)
    call.out, call.saved = address(out), address(saved)
    scratch = kernels.scratch("decoder_scratch_bytes", pointer, FLAG(False))
    kernels.call("decoder", pointer, scratch)
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
    """Gradients of `x`, if `grad_x`, and of all A and all B of each group, the latter in float32.

    Args:
        kernels: As for `forward`.
        x: As for `forward`.
        layer: As for `forward`.
        saved: Returned by `forward`.
        call: Returned by `forward`.
        grad: Gradient of the output, contiguous.
        grad_x: Whether `x` needs a gradient.
    """
    grads = []
    call.norm[:] = [address(norm) for norm in layer.norms]  # weights may have moved since
    for linears, group in zip(call.linears(), layer.groups, strict=True):
        linears.describe(len(x), group)  # tensors may have moved since the forward pass
        grads += linears.allocate_gradients(group)
    out = torch.empty_like(x) if grad_x else None
    call.x, call.saved, call.grad, call.dx = map(address, (x, saved, grad, out))
    pointer = ctypes.byref(call)
    scratch = kernels.scratch("decoder_scratch_bytes", pointer, FLAG(True))
    kernels.call("decoder_backward", pointer, scratch)
    return out, grads


def _structure(x: Tensor, layer: Layer) -> Call:
    call = Call(x=address(x))
    call.norm[:] = [address(norm) for norm in layer.norms]  # weights may have moved since
    call.eps[:] = layer.eps
    for linears, group in zip(call.linears(), layer.groups, strict=True):
        linears.describe(len(x), group)
    call.rows = packed(layer.rows, layer.rotation, len(x), *layer.heads)
    return call
