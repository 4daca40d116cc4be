"""What attention over cumulative lengths is asked for on a GPU, and what is installed that does it.

torch's and flash-attn's functions change from release to release. Each is asked which arguments it
takes (its schema or signature), never which version it is.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

AMPERE = (8, 0)


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asks of attention, besides the tensors.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        heads: of the queries.
        kv_heads: of keys and values; query head h reads kv head ``h // (heads / kv_heads)``.
        width: numbers of a query or key head.
        value_width: numbers of a value head.
        scale: factor of the scores.
        window: a token sees itself and the ``window - 1`` tokens before it; None: all before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        dropout: share of attention weights set to zero.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    width: int
    value_width: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Functions:
    """What this installation offers; None where it has no such function.

    Attributes:
        capability: compute capability of the GPU.
        flash: ``torch.ops.aten._flash_attention_forward.default``.
        varlen: ``torch.nn.attention.varlen.varlen_attn`` (torch 2.10 and later).
        package: ``flash_attn.flash_attn_varlen_func``.
        efficient: ``torch.ops.aten._efficient_attention_forward.default``.
        efficient_backward: ``torch.ops.aten._efficient_attention_backward.default``.
    """

    capability: tuple[int, int]
    flash: Any = None
    varlen: Any = None
    package: Any = None
    efficient: Any = None
    efficient_backward: Any = None


@cache
def functions_for(device: torch.device) -> Functions:
    """The functions of the installed torch and flash-attn, for a GPU."""
    return Functions(
        capability=torch.cuda.get_device_capability(device),
        flash=_aten("_flash_attention_forward"),
        varlen=_torch_varlen(),
        package=_flash_attn_package(),
        efficient=_aten("_efficient_attention_forward"),
        efficient_backward=_aten("_efficient_attention_backward"),
    )


def _aten(name: str) -> Any:
    return getattr(getattr(torch.ops.aten, name, None), "default", None)


def _torch_varlen() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch 2.8 and 2.9
        return None
    return varlen_attn


def _flash_attn_package() -> Any:
    """A folder of that name, or a build for another torch, is found but cannot be imported."""
    try:
        from flash_attn import (  # type: ignore[import-not-found, unused-ignore]
            flash_attn_varlen_func,
        )
    except (ImportError, OSError):
        return None
    return flash_attn_varlen_func


def parameters_of(function: Any) -> frozenset[str]:
    """Names of the arguments that an operation of torch, or a Python function, takes."""
    schema = getattr(function, "_schema", None)
    if schema is not None:
        return frozenset(argument.name for argument in schema.arguments)
    return frozenset(inspect.signature(function).parameters)


class Kernel:
    """Causal attention within samples that lie end to end.

    Attributes:
        name: what a run calls it.
        family: what it does, by whichever function.
    """

    name: str
    family: str

    def refusal(self, call: AttentionCall) -> str:
        """Why it cannot serve `call`; empty if it can."""
        raise NotImplementedError

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """The next head sizes that it takes, of queries and keys, and of values."""
        raise NotImplementedError

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """As a call of the kernel, for heads of `widths`."""
        raise NotImplementedError

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """Map queries ``[N, heads, width]`` to outputs ``[N, heads, value_width]``.

        Heads are filled up with zeros to `widths`, which change no score and no other output.

        Args:
            query: a row of samples end to end.
            key: ``[N, kv_heads, width]``.
            value: ``[N, kv_heads, value_width]``.
            cu_seqlens: where samples start, and the end of the last; int32, on the device.
            longest: tokens of the longest sample.
            call: what the layer asks for.
        """
        width, value_width = self.widths(call)
        query, key, value = _filled(query, width), _filled(key, width), _filled(value, value_width)
        out = self.attend(query, key, value, cu_seqlens, longest, call)
        return out if value_width == call.value_width else out[..., : call.value_width]


def _filled(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def next_multiple(count: int, of: int) -> int:
    """The smallest multiple that is not below `count`."""
    return -(-count // of) * of


def lacks(function: Any, *names: str) -> str:
    """That `function` does not take all of these arguments, if so."""
    missing = [name for name in names if name not in parameters_of(function)]
    return f"has no {' and no '.join(missing)} in this release" if missing else ""


def dotted(capability: tuple[int, int]) -> str:
    """As NVIDIA writes it: 7.5."""
    return ".".join(map(str, capability))


def type_name(dtype: torch.dtype) -> str:
    """Without the library's name."""
    return str(dtype).removeprefix("torch.")
