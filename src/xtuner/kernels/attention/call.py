"""The parameters of a variable-length attention call on a GPU, and the functions installed for it.

The functions of torch and flash-attn change between releases. Support is detected by their schema
or signature, never by version.
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
    """The parameters of a layer's attention, except the tensors.

    Attributes:
        device: Device of the tensors.
        dtype: Dtype of the tensors.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; query head h reads kv head
            ``h // (heads / kv_heads)``.
        width: Head size of queries and keys.
        value_width: Head size of values.
        scale: Factor of the scores.
        window: A token attends to itself and the ``window - 1`` tokens before it; None: to all
            earlier tokens.
        softcap: Scores become ``softcap * tanh(scores / softcap)``.
        dropout: Probability that an attention weight is set to zero.
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
    """The attention functions of this installation; None if missing.

    Attributes:
        capability: Compute capability of the GPU.
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
    """The functions of the installed torch and flash-attn for a GPU."""
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
    """The function of flash-attn; None if it is missing or fails to import (a build for another
    torch)."""
    try:
        from flash_attn import (  # type: ignore[import-not-found, unused-ignore]
            flash_attn_varlen_func,
        )
    except (ImportError, OSError):
        return None
    return flash_attn_varlen_func


def parameters_of(function: Any) -> frozenset[str]:
    """Argument names of a torch operation or a Python function."""
    schema = getattr(function, "_schema", None)
    if schema is not None:
        return frozenset(argument.name for argument in schema.arguments)
    return frozenset(inspect.signature(function).parameters)


class Kernel:
    """Variable-length causal attention.

    Attributes:
        name: The name in console output.
        family: The algorithm and library, for messages that hold for several functions.
    """

    name: str
    family: str

    def refusal(self, call: AttentionCall) -> str:
        """Why the kernel does not support `call`; empty if it does."""
        raise NotImplementedError

    def widths(self, call: AttentionCall) -> tuple[int, int]:
        """The head sizes to which queries and keys, and values, are padded."""
        raise NotImplementedError

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """`__call__` for heads of the sizes in `widths`."""
        raise NotImplementedError

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int,
        call: AttentionCall,
    ) -> Tensor:  # fmt: skip
        """Map queries ``[N, heads, width]`` to outputs ``[N, heads, value_width]``.

        Heads are padded with zeros to `widths`, which changes no score and no other output.

        Args:
            query: The queries of a packed row.
            key: ``[N, kv_heads, width]``.
            value: ``[N, kv_heads, value_width]``.
            cu_seqlens: The start of each sample and the end of the last; int32, on the device.
            longest: Length of the longest sample.
            call: The parameters of the layer.
        """
        width, value_width = self.widths(call)
        query, key, value = _padded(query, width), _padded(key, width), _padded(value, value_width)
        out = self.attend(query, key, value, cu_seqlens, longest, call)
        return out if value_width == call.value_width else out[..., : call.value_width]


def _padded(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def next_multiple(count: int, of: int) -> int:
    """The smallest multiple of `of` that is at least `count`."""
    return -(-count // of) * of


def lacks(function: Any, *names: str) -> str:
    """Which of these arguments `function` does not take; empty if it takes all."""
    missing = [name for name in names if name not in parameters_of(function)]
    return f"does not take {' or '.join(missing)} in this release" if missing else ""


def dotted(capability: tuple[int, int]) -> str:
    """A compute capability as NVIDIA writes it: 7.5."""
    return ".".join(map(str, capability))
