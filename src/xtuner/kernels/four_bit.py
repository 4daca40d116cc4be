"""Read 4-bit weights of bitsandbytes, also where bitsandbytes misreads them on a CPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.kernels.fused.forward_override import with_forward


def dequantized(weight: Tensor, state: Any) -> Tensor:
    """Values ``[out, in]`` of a 4-bit weight, in `state.dtype`.

    Blocks with one scale go on from one row to the next, but bitsandbytes' function for CPUs begins
    anew with each (0.50.2), and gives garbage without a word for most rows that are no whole
    blocks, as SigLIP's of 4,304. Of one long row it reads all rightly.
    """
    from bitsandbytes.functional import dequantize_4bit

    shape = state.shape
    if weight.device.type == "cpu" and shape[-1] % state.blocksize:
        state = copy.copy(state)
        state.shape = torch.Size((1, shape.numel()))
    values: Tensor = dequantize_4bit(weight, state).view(shape)
    return values


class _ReadRightly:
    """The forward pass of a `Linear4bit` whose weight bitsandbytes would misread; see
    `dequantized`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        dtype = self.compute_dtype or x.dtype
        weight = dequantized(self.weight.data, self.weight.quant_state).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight, bias).to(x.dtype)


def mend_4bit_layers(model: nn.Module) -> None:
    """Keep bitsandbytes on a CPU from reading 4-bit weights wrongly (0.50.2), in both of its ways.

    Rows that are no whole blocks: see `dequantized`. And layers that it repacks in place for
    AVX512-BF16 CPUs, in the first forward pass without gradients in evaluation mode: after that
    the backward pass and `dequantize` read garbage, with only a warning. Either may go once
    bitsandbytes is right.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (typed as a tensor)
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        on_cpu = isinstance(weight, Tensor) and weight.device.type == "cpu"
        if on_cpu and state is not None and state.shape[-1] % state.blocksize:
            kind: Any = type(module)
            module.__class__ = with_forward(_ReadRightly, kind)
