"""Dequantize 4-bit weights of bitsandbytes, also where bitsandbytes is wrong on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.kernels.fused.forward_override import with_forward


def dequantized(weight: Tensor, state: Any) -> Tensor:
    """Dequantize a 4-bit weight to ``[out, in]`` in `state.dtype`.

    Quantization blocks continue across rows, but the CPU function of bitsandbytes (0.50.2) starts a
    new block in each row and silently returns garbage if the row length is not a multiple of the
    block size, as in SigLIP (4,304). It is correct for a single long row.
    """
    from bitsandbytes.functional import dequantize_4bit

    shape = state.shape
    if weight.device.type == "cpu" and shape[-1] % state.blocksize:
        state = copy.copy(state)
        state.shape = torch.Size((1, shape.numel()))
    values: Tensor = dequantize_4bit(weight, state).view(shape)
    return values


class _DequantizedLinear:
    """The forward pass of a `Linear4bit` whose weight bitsandbytes dequantizes incorrectly; see
    `dequantized`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        dtype = self.compute_dtype or x.dtype
        weight = dequantized(self.weight.data, self.weight.quant_state).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight, bias).to(x.dtype)


def fix_4bit_layers(model: nn.Module) -> None:
    """Work around two bugs of bitsandbytes (0.50.2) in 4-bit layers on a CPU.

    Rows that are not a multiple of the block size: see `dequantized`. And layers that it repacks in
    place for AVX512-BF16 CPUs in the first forward pass without gradients in evaluation mode: after
    that the backward pass and `dequantize` read garbage, with only a warning. Remove each once
    bitsandbytes is fixed.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (typed as a tensor)
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu"
        if on_cpu and state is not None and state.shape[-1] % state.blocksize:
            kind: Any = type(module)
            module.__class__ = with_forward(_DequantizedLinear, kind)
