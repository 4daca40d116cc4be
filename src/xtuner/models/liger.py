"""liger's Triton kernels for norms and gates on a GPU, where the package is installed.

They are tried once, forward and backward, on a few numbers against the formula; kernels that fail
or give something else on this card are not used.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Liger:
    """The two kernels."""

    def __init__(self) -> None:
        from liger_kernel.ops.rms_norm import (  # type: ignore[import-not-found, unused-ignore]
            LigerRMSNormFunction,
        )
        from liger_kernel.ops.swiglu import (  # type: ignore[import-not-found, unused-ignore]
            LigerSiLUMulFunction,
        )

        self._norm: Any = LigerRMSNormFunction
        self._gate: Any = LigerSiLUMulFunction

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `fused_layers.RMSNorm`."""
        out: Tensor = self._norm.apply(x, weight, eps, 0.0, "llama", False)
        return out

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``; the backward pass overwrites both."""
        out: Tensor = self._gate.apply(gate, up)
        return out


def liger_for(x: Tensor) -> Liger | None:
    """The kernels for `x`, or None where it is not on a GPU or they do not work."""
    return _checked(x.device)[0] if x.device.type == "cuda" else None


def state(device: torch.device) -> str:
    """What a run on a GPU says about them."""
    return _checked(device)[1]


@cache
def _checked(device: torch.device) -> tuple[Liger | None, str]:
    """The kernels, or None, and what is said of them."""
    unused = "liger's kernels are not used"
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "liger's kernels are not installed (pip install 'xtuner[gpu]')"
    try:
        found = Liger()
        # The first to ask may have gradients off, or autocast on, as a check of layers has.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            norm, gate = _norm_is_right(found, device), _gate_is_right(found, device)
    except Exception as error:  # an incomplete package, a compiler error of Triton, a new signature
        first = next(iter(str(error).splitlines()), "")
        return None, f"{unused} ({type(error).__name__}: {first})"
    if not (norm and gate):
        return None, f"{unused} (wrong numbers on this card)"
    return found, "liger's kernels"


def _numbers(device: torch.device, shift: float) -> Tensor:
    count = torch.arange(4 * 64, dtype=torch.float32, device=device).view(1, 4, 64)
    return (torch.sin(count * 12.9898 + shift) * 2).to(torch.bfloat16).requires_grad_()


def _norm_is_right(kernels: Liger, device: torch.device) -> bool:
    weight = _numbers(device, 1.0).detach()[0, 0]

    def plain(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()

    return _same(lambda x: kernels.rms_norm(x, weight, 1e-5), plain, _numbers(device, 0.0))


def _gate_is_right(kernels: Liger, device: torch.device) -> bool:
    gate, up = _numbers(device, 0.0), _numbers(device, 2.0)
    return _same(
        lambda *x: kernels.silu_product(x[0] * 1, x[1] * 1), lambda g, u: F.silu(g) * u, gate, up
    )


def _same(ours: Any, plain: Any, *inputs: Tensor) -> bool:
    wide = [x.detach().float().requires_grad_() for x in inputs]
    got, wanted = ours(*inputs), plain(*wide)
    pull = torch.cos(torch.arange(wanted.numel(), device=wanted.device)).view_as(wanted)
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad(got, inputs, pull.to(got.dtype)),
        torch.autograd.grad(wanted, wide, pull),
        strict=True,
    )
    return all(bool((a.float() - b).norm() <= 0.02 * b.norm()) for a, b in pairs)
