"""Causal attention of samples that lie end to end, on a GPU: which kernel does it.

`choose` takes the first kernel that serves a layer's call and proves itself (`varlen_proof`), once
for each kind of call. A kernel that raises or differs is left aside, and the reason is kept for
`Choice.line`, which a run prints before its first step.
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
from xtuner.kernels.attention.proof import fault_of


def kernels(functions: Functions) -> Iterator[Kernel]:
    """The kernels in order of preference.

    ``aten._flash_attention_forward`` comes before ``varlen_attn``, which calls it from an operation
    written in Python: 128 us of host time a call against 37 (torch 2.13). flash-attn's kernel is
    the same algorithm; it comes behind, and is chosen for the soft cap that torch's lacks.
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
        kernel: None: nothing attends over cumulative lengths here.
        refused: why kernels before it were not taken.
    """

    kernel: Kernel | None
    refused: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Why nothing better is used; empty where it is the best there is."""
        return "; ".join(self.refused)

    def line(self) -> str:
        """What is used, and why nothing better is."""
        if self.kernel is None:
            return f"one call per sample: {self.why}"
        return f"{self.kernel.name}, since {self.why}" if self.refused else self.kernel.name


@cache
def choose(call: AttentionCall) -> Choice:
    """The kernel for `call` on this machine."""
    if call.device.type != "cuda":
        return Choice(None, (f"a {call.device.type} has no kernel over cu_seqlens",))
    return pick(call, functions_for(call.device))


def pick(call: AttentionCall, functions: Functions) -> Choice:
    """The first kernel made of `functions` that serves `call` and proves itself."""
    refused: dict[str, None] = {}  # all flash attention gives one reason, where it is the same
    for kernel in kernels(functions):
        if why := kernel.refusal(call):
            refused[f"{kernel.family} {why}"] = None
        elif fault := fault_of(kernel, call):
            refused[f"{kernel.name} {fault}"] = None
        else:
            return Choice(kernel, tuple(refused))
    if not refused:
        return Choice(None, ("this torch has no kernel over cu_seqlens, nor is there flash-attn",))
    return Choice(None, tuple(refused))


def attend(
    query: Tensor, key: Tensor, value: Tensor, call: AttentionCall, *, cu_seqlens: Tensor,
    longest: int | None,
) -> Tensor | None:  # fmt: skip
    """Attention by the kernel for `call`, ``[N, heads, D]`` to the same; None where there is none.

    `cu_seqlens` may be on the CPU; `longest` is the length of the longest sample, if it is known.
    """
    kernel = choose(call).kernel
    if kernel is None:
        return None
    longest = longest or int(cu_seqlens.diff().max())
    return kernel(query, key, value, _on_device(cu_seqlens, query.device), longest, call)


_last_moved: list[tuple[Tensor, Tensor]] = []


def _on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """`cu_seqlens` as int32 on `device`, copied once for all layers, which get the same tensor."""
    if not _last_moved or _last_moved[0][0] is not cu_seqlens:
        moved = cu_seqlens.to(device, torch.int32, non_blocking=True)
        _last_moved[:] = [(cu_seqlens, moved)]
    return _last_moved[0][1]
