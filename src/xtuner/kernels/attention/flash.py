"""Variable-length flash attention of torch and flash-attn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.device.select import name_of
from xtuner.kernels.attention.call import (
    AMPERE,
    AttentionCall,
    Functions,
    Kernel,
    dotted,
    lacks,
    next_multiple,
    parameters_of,
)


class _Flash(Kernel):
    """The common part of flash attention, which supports grouped-query attention natively."""

    family = "torch's flash attention"

    def __init__(self, function: Any, capability: tuple[int, int]):
        self._function, self._capability = function, capability
        self._takes = parameters_of(function)

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """The same multiple of 8 for both."""
        width = next_multiple(max(call.width, call.value_width), 8)
        return width, width

    def refusal(self, call: AttentionCall) -> str:
        """Check the GPU, the dtype and the head size, then the arguments of the function."""
        if self._capability < AMPERE:
            return f"needs compute capability 8.0 (Ampere), not {dotted(self._capability)}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"supports float16 and bfloat16, not {name_of(call.dtype)}"
        if self.widths(call)[0] > 256:
            return f"supports head sizes up to 256, not {max(call.width, call.value_width)}"
        return self._missing(call)

    def _missing(self, call: AttentionCall) -> str:
        raise NotImplementedError


class AtenFlash(_Flash):
    """The operation that torch's public attention functions also call."""

    name = "varlen flash attention (torch)"

    def __init__(self, functions: Functions):
        super().__init__(functions.flash, functions.capability)

    def _missing(self, call: AttentionCall) -> str:
        if call.softcap is not None:
            return "does not support softcap"
        windows = ("window_size_left", "window_size_right") if call.window is not None else ()
        return lacks(self._function, "scale", *windows)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """torch defines the gradient (derivatives.yaml), including window and dropout."""
        windows = {}
        if call.window is not None:
            windows = {"window_size_left": call.window - 1, "window_size_right": 0}
        dropout, causal, debug = call.dropout, True, False
        out: Tensor = self._function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, dropout, causal, debug,
            scale=call.scale, **windows,
        )[0]  # fmt: skip
        return out


class TorchVarlen(_Flash):
    """torch's public function (2.10 and later); in 2.10 it takes neither scale nor window."""

    name = "varlen flash attention (torch's varlen_attn)"

    def __init__(self, functions: Functions):
        super().__init__(functions.varlen, functions.capability)

    def _missing(self, call: AttentionCall) -> str:
        if call.softcap is not None:
            return "does not support softcap"
        if call.dropout:
            return "does not support dropout"
        if call.window is not None or "is_causal" not in self._takes:
            return lacks(self._function, "window_size")
        usual = self.widths(call)[0] ** -0.5
        return "" if call.scale == usual else lacks(self._function, "scale")

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """In torch 2.10 causal is a flag; since then it is a window unbounded to the left."""
        back = -1 if call.window is None else call.window - 1
        options: dict[str, Any] = {
            "scale": call.scale,
            "window_size": (back, 0),
            "enable_gqa": call.heads != call.kv_heads,
        }
        options = {name: value for name, value in options.items() if name in self._takes}
        if "window_size" not in options:
            options["is_causal"] = True
        out: Tensor = self._function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options
        )
        return out


class FlashAttnPackage(_Flash):
    """The function of the package flash-attn, the only one that supports softcap."""

    name = "varlen flash attention (flash-attn)"
    family = "flash-attn"

    def __init__(self, functions: Functions):
        super().__init__(functions.package, functions.capability)

    def _missing(self, call: AttentionCall) -> str:
        return lacks(self._function, *self._options(call))

    def _options(self, call: AttentionCall) -> dict[str, Any]:
        options: dict[str, Any] = {"softmax_scale": call.scale, "causal": True}
        if call.window is not None:
            options["window_size"] = (call.window - 1, 0)
        if call.softcap is not None:
            options["softcap"] = call.softcap
        if call.dropout:
            options["dropout_p"] = call.dropout
        return options

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """The function is differentiable."""
        out: Tensor = self._function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, **self._options(call)
        )
        return out
