"""Flash attention over cumulative lengths by torch's and flash-attn's functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.attention.call import (
    AMPERE,
    AttentionCall,
    Functions,
    Kernel,
    dotted,
    lacks,
    next_multiple,
    parameters_of,
    type_name,
)


class _Flash(Kernel):
    """What all flash attention has in common. It takes fewer key than query heads as they are."""

    family = "torch's flash attention"

    def __init__(self, function: Any, capability: tuple[int, int]):
        self._function, self._capability = function, capability
        self._takes = parameters_of(function)

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """One multiple of 8 for both."""
        width = next_multiple(max(call.width, call.value_width), 8)
        return width, width

    def refusal(self, call: AttentionCall) -> str:
        """By the GPU, the type and the width, then by what the function takes."""
        if self._capability < AMPERE:
            return f"needs compute capability 8.0 (Ampere), not {dotted(self._capability)}"
        if call.dtype not in (torch.bfloat16, torch.float16):
            return f"takes 16 bits, not {type_name(call.dtype)}"
        if self.widths(call)[0] > 256:
            return f"takes heads of up to 256 numbers, not {max(call.width, call.value_width)}"
        return self._missing(call)

    def _missing(self, call: AttentionCall) -> str:
        raise NotImplementedError


class AtenFlash(_Flash):
    """The operation of torch that is behind its own attention functions too."""

    name = "flash attention over cu_seqlens (torch)"

    def __init__(self, functions: Functions):
        super().__init__(functions.flash, functions.capability)

    def _missing(self, call: AttentionCall) -> str:
        if call.softcap is not None:
            return "has no soft cap"
        windows = ("window_size_left", "window_size_right") if call.window is not None else ()
        return lacks(self._function, "scale", *windows)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """torch has its gradient (derivatives.yaml), with windows and dropout."""
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
    """torch's public function (2.10 and later); that of 2.10 takes neither scale nor window."""

    name = "flash attention over cu_seqlens (torch's varlen_attn)"

    def __init__(self, functions: Functions):
        super().__init__(functions.varlen, functions.capability)

    def _missing(self, call: AttentionCall) -> str:
        if call.softcap is not None:
            return "has no soft cap"
        if call.dropout:
            return "has no dropout"
        if call.window is not None or "is_causal" not in self._takes:
            return lacks(self._function, "window_size")
        usual = self.widths(call)[0] ** -0.5
        return "" if call.scale == usual else lacks(self._function, "scale")

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """Causal order is a flag in 2.10, and a window without an end to the left since."""
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
    """That of the package flash-attn, the only one with a soft cap of the scores."""

    name = "flash attention over cu_seqlens (the package flash-attn)"
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
        """It has a gradient."""
        out: Tensor = self._function(
            query, key, value, cu_seqlens, cu_seqlens, longest, longest, **self._options(call)
        )
        return out
