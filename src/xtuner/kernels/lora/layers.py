"""PEFT's LoRA layers with a forward pass that multiplies in the dtype of the activations.

PEFT multiplies in float32, the dtype of the adapters, and casts every activation to it and back;
here A and B are stored and optimised in float32 and cast for the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.kernels.lora.linear import Adapted, lora_linears


class _ActivationTypeForward:
    """The forward pass of a LoRA layer in the dtype of its input."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``W x + scaling * B A dropout(x)``; anything but a single plain adapter is left to
        PEFT."""
        adapted = None if kwargs else self.adapted()
        if adapted is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        if type(adapted.layer) in _fused_layers() and torch.is_grad_enabled():
            return lora_linears(x, (adapted,))[0]
        inner = F.linear(F.dropout(x, adapted.dropout), adapted.down.to(x.dtype))
        up = (adapted.up * adapted.scaling).to(x.dtype)
        return self.base_layer(x) + F.linear(inner, up)  # type: ignore[no-any-return]

    def adapted(self: Any) -> Adapted | None:
        """The layer with its adapter, if it has a single plain adapter."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or self.lora_variant:
            return None
        (name,) = active
        if self.lora_B[name].bias is not None:
            return None
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        drop = self.lora_dropout[name]
        dropout = drop.p if self.training and isinstance(drop, nn.Dropout) else 0.0
        return Adapted(self.base_layer, down, up, self.scaling[name], dropout)


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Outputs of linear layers that take the same `x`, including adapters; one operation where
    possible."""
    parts = adapted_parts(layers) if torch.is_grad_enabled() else None
    return tuple(layer(x) for layer in layers) if parts is None else lora_linears(x, parts)


def adapted_parts(layers: Sequence[nn.Module]) -> list[Adapted] | None:
    """Linear layers with their adapters; None unless `lora_linears` supports all of them."""
    parts = []
    for layer in layers:
        part = layer.adapted() if isinstance(layer, _ActivationTypeForward) else None
        if part is None or type(part.layer) not in _fused_layers():
            return None
        parts.append(part)
    return parts


@cache
def _fused_layers() -> tuple[type[nn.Module], ...]:
    """Classes of layers that `lora_linears` supports."""
    import bitsandbytes as bnb

    return (nn.Linear, bnb.nn.Linear4bit)


def layer_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """The LoRA layer class for each class of base layer; the first match wins."""
    import bitsandbytes as bnb
    from peft.tuners.lora import bnb as peft_bnb
    from peft.tuners.lora.layer import Linear

    def ours(base: type) -> type[nn.Module]:
        return type(f"XTuner{base.__name__}", (_ActivationTypeForward, base), {})

    return {
        bnb.nn.Linear4bit: ours(peft_bnb.Linear4bit),
        bnb.nn.Linear8bitLt: ours(peft_bnb.Linear8bitLt),
        nn.Linear: ours(Linear),
    }
