"""Stores frozen weights in 4 or 8 bits with bitsandbytes (QLoRA, arXiv:2305.14314, section 3). NF4
with double quantization stores a weight in about 4.1 bits: 4 for the value, 8/64 for the scale of
its block of 64, and 32/(64·256) for the scale of 256 scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xtuner.kernels.four_bit import dequantized
from xtuner.kernels.quantize_4bit import use_compiled

Quantization = Literal["none", "nf4", "fp4", "int8"]


def quantization_config(
    quantization: Quantization, *, double_quant: bool, compute_dtype: torch.dtype
) -> Any:
    """The `BitsAndBytesConfig` for `quantization`, which must not be 'none'."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    use_compiled()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_quantized(model: nn.Module) -> bool:
    """Whether `model` has bitsandbytes weights."""
    return bool(getattr(model, "is_quantized", False))


@dataclass(frozen=True)
class Rounding:
    """Rounds a weight as 4-bit quantization does: quantizes and dequantizes it. An adapter trained
    on quantized weights has learned to correct *these* values, not the checkpoint's.
    """

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    dtype: torch.dtype

    @classmethod
    def of_run(cls, settings: Mapping[str, Any], dtype: str = "") -> Rounding | None:
        """The rounding of a run; None if its weights were not in 4 bits.

        Args:
            dtype: The dtype that the run computed in (`RunInfo.computed_in`); bfloat16 if unknown.
        """
        kind: Any = settings.get("quantization", "auto")
        kind = "nf4" if kind == "auto" and settings.get("tuning") == "qlora" else kind
        if kind not in ("nf4", "fp4"):
            return None
        known = {"float32": torch.float32, "float16": torch.float16}
        computed = known.get(dtype or str(settings.get("dtype")), torch.bfloat16)
        return cls(kind, bool(settings.get("double_quant", True)), computed)

    def __call__(self, weight: Tensor) -> Tensor:
        """Round one weight matrix, keeping its dtype."""
        from bitsandbytes.functional import quantize_4bit

        use_compiled()
        packed, state = quantize_4bit(
            weight.to(self.dtype).contiguous(),
            blocksize=64,
            compress_statistics=self.double_quant,
            quant_type=self.quant_type,
        )
        return dequantized(packed, state).to(weight.dtype)

    def names(self, model: Any) -> frozenset[str]:
        """Names of the quantized weights: those of all linear layers except the output head."""
        head = model.get_output_embeddings()
        return frozenset(
            f"{name}.weight"
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        )

    @torch.no_grad()
    def apply(self, model: Any) -> None:
        """Round the weights of an unquantized model in place."""
        names = self.names(model)
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(self(parameter))
