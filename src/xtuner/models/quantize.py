"""Hold frozen weights in 4 or 8 bits with bitsandbytes (QLoRA, arXiv:2305.14314, section 3).

NF4 with double quantisation stores a weight in about 4.1 bits: 4 for the value, 8/64 for the scale
of its block of 64, and 32/(64·256) for the scale of 256 scales.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

Quantization = Literal["none", "nf4", "fp4", "int8"]


def quantization_config(
    quantization: Quantization, *, double_quant: bool, compute_dtype: torch.dtype
) -> Any:
    """The `BitsAndBytesConfig` for `quantization`; 'none' is not allowed here."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def protect_from_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for AVX512-BF16 CPUs.

    The first forward pass without gradients in evaluation mode repacks them in place; after that
    the backward pass and `dequantize` read garbage, with only a warning (bitsandbytes 0.50.2). May
    go once the repacked layout has a backward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (typed as a tensor)


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` holds bitsandbytes weights."""
    return bool(getattr(model, "is_quantized", False))
