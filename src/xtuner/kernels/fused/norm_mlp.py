"""Fused norms and gated feed-forward layers that save little for the backward pass.

`install` replaces layers of a model, keeping their weights and names, and only if both give the
same results on a fixed input: a layer that computes something else is left unchanged, whatever the
architecture.

    RMS norm (arXiv:1910.07467, equation 4)   y = w * x r,  r = 1 / sqrt(mean(x^2) + eps)
                                              dx = r g - x r^3 mean(g x),  g = w dy
    SwiGLU (arXiv:2002.05202, equation 6)     y = W_d (silu(W_g x) * W_u x)
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from xtuner.device.heap import trim_if_grown
from xtuner.device.select import half_dtype
from xtuner.kernels.compiled import kernels_for
from xtuner.kernels.fused.liger import liger_for
from xtuner.kernels.lora.layers import project


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels = kernels_for(x, weight)
        if kernels is not None:
            y, scale = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).to(x.dtype) * weight
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[1]
        kernels = kernels_for(grad, x, weight)
        if kernels is not None:
            grad_x, grad_w = kernels.rms_norm_backward(grad, x, weight, scale, grad_weight=needed)
            return grad_x, None if grad_w is None else grad_w.to(weight.dtype), None
        inner = grad * weight
        wide = inner.float() if x.dtype == torch.float16 else inner  # the product may overflow
        mean = (wide * x).sum(-1, keepdim=True, dtype=scale.dtype) / x.shape[-1]
        grad_x = (inner * scale).addcmul_(x, scale.pow(3) * mean, value=-1).to(x.dtype)
        grad_weight = None
        if needed:
            products = (x * scale).to(x.dtype) * grad
            grad_weight = products.flatten(0, -2).sum(0, dtype=scale.dtype).to(weight.dtype)
        return grad_x, grad_weight, None


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension, with the mean in float32."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``[..., H]``."""
        if (liger := liger_for(x)) is not None:
            return liger.rms_norm(x, self.weight, self.variance_epsilon)
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-any-return, no-untyped-call]


def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    kernels = kernels_for(gate, up)
    return F.silu(gate).mul_(up) if kernels is None else kernels.silu_product(gate, up)


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_product(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        kernels = kernels_for(grad, gate, up)
        if kernels is not None:
            return kernels.silu_product_backward(grad, gate, up)
        grad_up, grad_gate = F.silu(gate).mul_(grad), grad * up
        return torch.ops.aten.silu_backward(grad_gate, gate, grad_input=grad_gate), grad_up


def _has_outer_hooks() -> bool:
    """Whether saved-tensor hooks are active, such as those of activation checkpointing.

    torch calls only the innermost hooks: ours, inside them, would save gate and up of every layer.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class GatedMLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``; the product is recomputed in the backward pass instead of
    saved, unless the entire layer is recomputed."""

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., H]`` to ``[..., H]``."""
        gate, up = project(x, (self.gate_proj, self.up_proj))
        liger = liger_for(gate)
        product = _SiluProduct.apply if liger is None else liger.silu_product
        recompute = _silu_product if liger is None else liger.silu_product
        inner: Tensor = product(gate, up)  # type: ignore[no-untyped-call]
        if not inner.requires_grad or _has_outer_hooks():
            return self.down_proj(inner)  # type: ignore[no-any-return]
        storage, parts = inner.untyped_storage()._cdata, (gate.detach(), up.detach())

        def pack(saved: Tensor) -> Any:
            same = saved.untyped_storage()._cdata == storage and saved.numel() == inner_size
            return saved.shape if same and saved.dtype == parts[0].dtype else saved

        def unpack(saved: Any) -> Tensor:
            if isinstance(saved, Tensor):
                return saved
            return recompute(*parts).view(saved)  # before the backward pass of the product

        inner_size = inner.numel()
        with saved_tensors_hooks(pack, unpack):
            return self.down_proj(inner)  # type: ignore[no-any-return]


def install(model: nn.Module, *, check: bool = True) -> int:
    """Replace the layers of `model` whose results do not change; return their number.

    `check` = False skips the comparison of results, for meta tensors.
    """
    installed = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            ours = _norm_like(child, check) or _mlp_like(child, check)
            if ours is not None:
                setattr(parent, name, ours)
                installed += 1
                trim_if_grown()
    return installed


def _norm_like(layer: nn.Module, check: bool) -> nn.Module | None:
    weight, eps = getattr(layer, "weight", None), getattr(layer, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if isinstance(layer, RMSNorm) or len(list(layer.parameters())) > 1:
        return None
    if len(inspect.signature(layer.forward).parameters) != 1:  # gated norms
        return None
    ours = RMSNorm(weight, eps)
    same = not check or _same(layer, ours, _probe(weight.shape[0], weight))
    return ours if same else None


def _mlp_like(layer: nn.Module, check: bool) -> nn.Module | None:
    children = dict(layer.named_children())
    act = children.pop("act_fn", None)
    if set(children) != {"gate_proj", "up_proj", "down_proj"} or isinstance(layer, GatedMLP):
        return None
    if act is None or type(act).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    first: Any = children["gate_proj"]
    if not isinstance(first, nn.Linear):
        return None
    ours = GatedMLP(**children)
    same = not check or _same(layer, ours, _probe(first.in_features, next(layer.parameters())))
    return ours if same else None


def _probe(width: int, like: Tensor) -> Tensor:
    """A fixed input of four rows, of the magnitude of real activations."""
    dtype = like.dtype if like.is_floating_point() else half_dtype(like.device.type)
    count = torch.arange(4 * width, dtype=torch.float32)
    return (torch.sin(count * 12.9898) * 3).view(1, 4, width).to(like.device, dtype)


@torch.no_grad()
def _same(theirs: nn.Module, ours: nn.Module, probe: Tensor) -> bool:
    wanted, got = theirs(probe), ours(probe)
    limit = {torch.float64: 1e-9, torch.float32: 1e-5}.get(probe.dtype, 1e-2)
    if not isinstance(wanted, Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return False
    difference = (wanted.double() - got.double()).abs().max()
    return bool(difference <= limit * wanted.double().abs().max())
