"""Liger's Triton kernels for norms, gated activations and rotary embedding, if installed.

They are tested once, forward and backward, against the formula on a small input; kernels that fail
or give other results on this GPU are not used.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.errors import brief


class Liger:
    """The kernels of liger-kernel that are used."""

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
        """See `norm_mlp.RMSNorm`."""
        out: Tensor = self._norm.apply(x, weight, eps, 0.0, "llama", False)
        return out

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``; the backward pass overwrites both."""
        out: Tensor = self._gate.apply(gate, up)
        return out

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys ``[N, heads, D]`` by angles ``[N, D]`` as in Llama; overwrites
        both, and their gradients in the backward pass."""
        rotated = self._rotation.apply(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        q, k = (x[0].transpose(0, 1) for x in rotated)
        return q, k


def liger_for(x: Tensor) -> Liger | None:
    """The kernels for `x`, or None if it is not on a GPU or they do not work."""
    return _checked(x.device)[0] if x.device.type == "cuda" else None


def state(device: torch.device) -> str:
    """One phrase for the console: the kernels are used, or why not."""
    return _checked(device)[1]


@cache
def _checked(device: torch.device) -> tuple[Liger | None, str]:
    """The kernels or None, and the phrase for the console."""
    unused = "Liger kernels are not used"
    if importlib.util.find_spec("liger_kernel") is None:
        return None, "Liger kernels are not installed (pip install 'xtuner[gpu]')"
    try:
        found = Liger()
        # The first caller may have disabled gradients or enabled autocast.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            passed = [check(found, device) for check in CHECKS]
    except Exception as error:  # an incomplete package, a compiler error of Triton, a new signature
        return None, f"{unused} ({brief(error)})"
    if not all(passed):
        return None, f"{unused} (wrong results on this GPU)"
    return found, "Liger kernels"


def _fixed_input(device: torch.device, shift: float) -> Tensor:
    count = torch.arange(4 * 64, dtype=torch.float32, device=device).view(1, 4, 64)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if old else torch.bfloat16
    return (torch.sin(count * 12.9898 + shift) * 2).to(dtype).requires_grad_()


def _check_norm(kernels: Liger, device: torch.device) -> bool:
    weight = _fixed_input(device, 1.0).detach()[0, 0]

    def plain(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.float()

    return _same(lambda x: kernels.rms_norm(x, weight, 1e-5), plain, _fixed_input(device, 0.0))


def _check_gate(kernels: Liger, device: torch.device) -> bool:
    gate, up = _fixed_input(device, 0.0), _fixed_input(device, 2.0)
    return _same(
        lambda *x: kernels.silu_product(x[0] * 1, x[1] * 1), lambda g, u: F.silu(g) * u, gate, up
    )


def _check_rotation(kernels: Liger, device: torch.device) -> bool:
    q, k = (_fixed_input(device, shift).detach() for shift in (0.0, 2.0))
    angles = torch.arange(4 * 8, dtype=torch.float32, device=device).view(4, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()

    def ours(*x: Tensor) -> Tensor:
        heads = [y.view(4, count, 16) * 1 for y, count in zip(x, (4, 2), strict=True)]
        return torch.cat([y.flatten() for y in kernels.rotate(heads[0], heads[1], cos, sin)])

    def plain(*x: Tensor) -> Tensor:
        heads = [y.view(4, count, 16) for y, count in zip(x, (4, 2), strict=True)]
        rotated = [
            y * cos[:, None] + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin[:, None]
            for y in heads
        ]
        return torch.cat([y.flatten() for y in rotated])

    inputs = (q.requires_grad_(), k[..., :32].contiguous().requires_grad_())
    return _same(ours, plain, *inputs)


CHECKS = (_check_norm, _check_gate, _check_rotation)


def _same(ours: Any, plain: Any, *inputs: Tensor) -> bool:
    wide = [x.detach().float().requires_grad_() for x in inputs]
    got, wanted = ours(*inputs), plain(*wide)
    grad_output = torch.cos(torch.arange(wanted.numel(), device=wanted.device)).view_as(wanted)
    pairs = [(got, wanted)]
    pairs += zip(
        torch.autograd.grad(got, inputs, grad_output.to(got.dtype)),
        torch.autograd.grad(wanted, wide, grad_output),
        strict=True,
    )
    return all(bool((a.float() - b).norm() <= 0.02 * b.norm()) for a, b in pairs)
