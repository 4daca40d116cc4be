"""Choose the kernel for variable-length causal attention on a GPU.

`choose` takes the first kernel that supports a call and passes `self_test`, once for each distinct
call. A kernel that raises or gives other results is skipped; the reason is part of `Choice.line`,
which a run prints before its first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from xtuner.kernels.attention.call import AttentionCall, Functions, Kernel, functions_for
from xtuner.kernels.attention.efficient import MemoryEfficient
from xtuner.kernels.attention.flash import AtenFlash, FlashAttnPackage, TorchVarlen
from xtuner.kernels.attention.self_test import failure_of


def kernels(functions: Functions) -> Iterator[Kernel]:
    """Yield the kernels in order of preference.

    ``aten._flash_attention_forward`` comes before ``varlen_attn``, which calls it from a Python
    operation: 37 us against 128 us of host time per call (torch 2.13). The kernel of flash-attn is
    the same algorithm; it comes after torch's, and is chosen for softcap, which torch's lacks.
    """
    if functions.flash is not None:
        yield AtenFlash(functions)
    if functions.varlen is not None:
        yield TorchVarlen(functions)
    if functions.package is not None:
        yield FlashAttnPackage(functions)
    if functions.efficient is not None and functions.efficient_backward is not None:
        yield MemoryEfficient(functions)


@dataclass(frozen=True)
class Choice:
    """The kernel for a call.

    Attributes:
        kernel: The kernel, or None if there is none.
        refused: Why kernels that come before it were rejected.
    """

    kernel: Kernel | None
    refused: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Why no preferred kernel is used; empty if the kernel is the preferred one."""
        return "; ".join(self.refused)

    def line(self) -> str:
        """The kernel and the reason for not using a preferred one."""
        if self.kernel is None:
            return f"one call per sample, because {self.why}"
        return f"{self.kernel.name}, because {self.why}" if self.refused else self.kernel.name


@cache
def choose(call: AttentionCall) -> Choice:
    """The kernel for `call` on this machine."""
    if call.device.type != "cuda":
        return Choice(None, (f"there is no varlen attention kernel for {call.device.type}",))
    return pick(call, functions_for(call.device))


def pick(call: AttentionCall, functions: Functions) -> Choice:
    """The first kernel among `functions` that supports `call` and passes the self-test."""
    refused: dict[str, None] = {}  # a dict, so that kernels of one family report a reason once
    for kernel in kernels(functions):
        if why := kernel.refusal(call):
            refused[f"{kernel.family} {why}"] = None
        elif fault := failure_of(kernel, call):
            refused[f"{kernel.name} {fault}"] = None
        else:
            return Choice(kernel, tuple(refused))
    if not refused:
        reason = "this torch has no varlen attention kernel and flash-attn is not installed"
        return Choice(None, (reason,))
    return Choice(None, tuple(refused))


def attend(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, *, cu_seqlens: Tensor,
    longest: int | None,
) -> Tensor | None:  # fmt: skip
    """Attention by the kernel for `call`, ``[N, heads, D]`` to the same shape; None without kernel.

    `cu_seqlens` may be on the CPU; `longest` is the length of the longest sample, if known.
    """
    kernel = choose(call).kernel
    if kernel is None:
        return None
    longest = longest or int(cu_seqlens.diff().max())
    return kernel(query, key, value, _on_device(cu_seqlens, query.device), longest, call)


_last_moved: list[tuple[Tensor, Tensor]] = []


def _on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """`cu_seqlens` as int32 on `device`, copied once for all layers, which pass the same tensor."""
    if not _last_moved or _last_moved[0][0] is not cu_seqlens:
        moved = cu_seqlens.to(device, torch.int32, non_blocking=True)
        _last_moved[:] = [(cu_seqlens, moved)]
    return _last_moved[0][1]
