"""liger's Triton kernels for norms, gates and rotation on a GPU, where the package is installed.

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
    """The three kernels."""

    def __init__(self) -> None:
        from liger_kernel.ops.rms_norm import (  # type: ignore[import-not-found, unused-ignore]
            LigerRMSNormFunction,
        )
        from liger_kernel.ops.rope import (  # type: ignore[import-not-found, unused-ignore]
            LigerRopeFunction,
        )
        from liger_kernel.ops.swiglu import (  # type: ignore[import-not-found, unused-ignore]
            LigerSiLUMulFunction,
        )

        self._norm: Any = LigerRMSNormFunction
        self._gate: Any = LigerSiLUMulFunction
        self._rotation: Any = LigerRopeFunction

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As `fused_layers.RMSNorm`."""
        out: Tensor = self._norm.apply(x, weight, eps, 0.0, "llama", False)
        return out

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``; the backward pass overwrites both."""
        out: Tensor = self._gate.apply(gate, up)
        return out

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``[N, heads, D]`` turned by angles ``[N, D]``, as Llama's; both are
        overwritten, and their gradients in the backward pass."""
        turned = self._rotation.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        q, k = (x[0].transpose(0, 1) for x in turned)
        return q, k


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
            right = [check(found, device) for check in CHECKS]
    except Exception as error:  # an incomplete package, a compiler error of Triton, a new signature
        first = next(iter(str(error).splitlines()), "")
        return None, f"{unused} ({type(error).__name__}: {first})"
    if not all(right):
        return None, f"{unused} (wrong numbers on this card)"
    return found, "liger's kernels"


def _numbers(device: torch.device, shift: float) -> Tensor:
    count = torch.arange(4 * 64, dtype=torch.float32, device=device).view(1, 4, 64)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if old else torch.bfloat16
    return (torch.sin(count * 12.9898 + shift) * 2).to(dtype).requires_grad_()


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


def _rotation_is_right(kernels: Liger, device: torch.device) -> bool:
    q, k = (_numbers(device, shift).detach() for shift in (0.0, 2.0))
    angles = torch.arange(4 * 8, dtype=torch.float32, device=device).view(4, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def ours(*x: Tensor) -> Tensor:
        heads = [y.view(4, count, 16) * 1 for y, count in zip(x, (4, 2), strict=True)]
        return torch.cat([y.flatten() for y in kernels.rotate(heads[0], heads[1], cos, sin)])

    def plain(*x: Tensor) -> Tensor:
        heads = [y.view(4, count, 16) for y, count in zip(x, (4, 2), strict=True)]
        turned = [
            y * cos[:, None] + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin[:, None]
            for y in heads
        ]
        return torch.cat([y.flatten() for y in turned])

    inputs = (q.requires_grad_(), k[..., :32].contiguous().requires_grad_())
    return _same(ours, plain, *inputs)


CHECKS = (_norm_is_right, _gate_is_right, _rotation_is_right)


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
