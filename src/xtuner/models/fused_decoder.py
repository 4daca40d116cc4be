"""Decoder layers of a CPU with LoRA on all their linear layers as one operation each way.

    y = x + W_o attention(norm(x) W_qkv),   out = y + W_d (silu(norm(y) W_g) * norm(y) W_u)

The compiled functions are those that the parts of the layer take one by one (`fused_layers`,
`fused_attention`, `low_rank`). Called in a row they leave autograd one operation instead of ten,
and both additions happen where the sums of a product, or of a norm's gradient, are rounded.
`install` changes only layers that are put together in this way, bit for bit; their own forward pass
stays, and is used wherever ours does not apply (dropout, recomputation, other adapters, trained
norms, a cache, no compiler). The parts are not called as modules: hooks on them see nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xtuner.models import cpu_low_rank, low_rank
from xtuner.models.adapters import adapted_parts
from xtuner.models.block_attention import Rotation
from xtuner.models.cpu_attention import rows_of
from xtuner.models.cpu_kernels import Kernels, Rows, kernels_for
from xtuner.models.fused_attention import (
    RotaryBlockAttention,
    probe_inputs,
    rotation_of,
    with_forward,
)
from xtuner.models.fused_layers import GatedMLP, RMSNorm
from xtuner.models.low_rank import Adapted

CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


@dataclass(frozen=True)
class _Layer:
    """What one pass through a layer needs.

    Attributes:
        groups: the linear layers, together where they take the same input: queries, keys and
            values; the output of attention; gate and up; down.
        norms: before attention and before the gated MLP.
        rows: who sees whom.
        rotation: cosines and sines of the positions.
        head: width of a head.
        kernels: those of bfloat16.
    """

    groups: tuple[Sequence[Adapted], ...]
    norms: tuple[RMSNorm, RMSNorm]
    rows: Rows
    rotation: Rotation
    head: int
    kernels: Kernels

    def adapters(self) -> list[Tensor]:
        """All A and all B of each group, in the order of their gradients."""
        groups = self.groups
        pairs = [([p.down for p in group], [p.up for p in group]) for group in groups]
        return [tensor for downs, ups in pairs for tensor in (*downs, *ups)]

    def norm(self, which: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """`x` normalised, and the factor of each row."""
        norm = self.norms[which]
        return self.kernels.rms_norm(x, norm.weight, norm.variance_epsilon)

    def norm_backward(
        self, which: int, grad: Tensor, x: Tensor, scale: Tensor, plus: Tensor
    ) -> Tensor:
        """Gradient of what `norm` took, with `plus`."""
        weight = self.norms[which].weight
        kernels = self.kernels
        return kernels.rms_norm_backward(grad, x, weight, scale, grad_weight=False, plus=plus)[0]

    def linear(
        self, which: int, x: Tensor, plus: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of a group, and what its adapters hold inside; `plus` is added to the first."""
        layers = [low_rank.layer_of(part, x.dtype) for part in self.groups[which]]
        layers[0] = layers[0]._replace(plus=plus)
        return cpu_low_rank.forward(self.kernels, x, layers)

    def linear_backward(
        self, which: int, x: Tensor, inner: Tensor, pulls: Sequence[Tensor], *, grad_x: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """Gradients of the input and of the adapters of a group."""
        layers = [low_rank.layer_of(part, x.dtype) for part in self.groups[which]]
        out, downs, ups = cpu_low_rank.backward(
            self.kernels, x, layers, inner, pulls, grad_x=grad_x
        )
        return out, [*downs, *ups]


class _DecoderLayer(torch.autograd.Function):
    """``[1, N, H]`` to ``[1, N, H]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: _Layer, *adapters: Tensor) -> Tensor:
        x, kernels = hidden[0], layer.kernels
        normed, scale = layer.norm(0, x)
        (q, k, v), inner_qkv = layer.linear(0, normed)
        q, k, v = (some.view(len(x), -1, layer.head) for some in (q, k, v))
        attended, logs = kernels.attention(q, k, v, layer.rotation, layer.rows)
        (y,), inner_out = layer.linear(1, attended.flatten(1), plus=x)
        normed_y, scale_y = layer.norm(1, y)
        (gate, up), inner_gate = layer.linear(2, normed_y)
        (out,), inner_down = layer.linear(3, kernels.silu_product(gate, up), plus=y)
        ctx.save_for_backward(
            *(x, scale, normed, q, k, v, attended, logs, y, scale_y, normed_y, gate, up),
            *(inner_qkv, inner_out, inner_gate, inner_down),
            *adapters,  # these for autograd to see them changed
        )
        ctx.layer = layer
        return out[None]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        layer: _Layer = ctx.layer
        x, scale, normed, q, k, v, attended, logs, y, scale_y, normed_y, gate, up, *rest = (
            ctx.saved_tensors
        )
        inner_qkv, inner_out, inner_gate, inner_down = rest[:4]
        kernels, pull = layer.kernels, grads[0][0].contiguous()
        inner = kernels.silu_product(gate, up)
        back, of_down = layer.linear_backward(3, inner, inner_down, [pull])
        back, of_gate = layer.linear_backward(
            2, normed_y, inner_gate, kernels.silu_product_backward(_whole(back), gate, up)
        )
        pull = layer.norm_backward(1, _whole(back), y, scale_y, plus=pull)
        back, of_out = layer.linear_backward(1, attended.flatten(1), inner_out, [pull])
        pulls = kernels.attention_backward(
            _whole(back).view_as(attended), q, k, v, layer.rotation, layer.rows, attended, logs
        )
        needed = ctx.needs_input_grad[0]
        flat = [some.flatten(1) for some in pulls]
        back, of_qkv = layer.linear_backward(0, normed, inner_qkv, flat, grad_x=needed)
        grad = layer.norm_backward(0, _whole(back), x, scale, plus=pull)[None] if needed else None
        return (grad, None, *of_qkv, *of_out, *of_gate, *of_down)


def _whole(grad: Tensor | None) -> Tensor:
    assert grad is not None  # it was asked for
    return grad


class _FusedDecoderLayer:
    """The forward pass of a decoder layer, in one operation where that can be."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map ``[1, N, H]`` to ``[1, N, H]``."""
        layer = None if args else _layer_of(self, hidden_states, kwargs)
        if layer is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return _DecoderLayer.apply(hidden_states, layer, *layer.adapters())  # type: ignore[no-untyped-call]


def _layer_of(layer: Any, x: Tensor, inputs: dict[str, Any]) -> _Layer | None:
    """What is needed for one operation; None where it has to go part by part."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    weights = [norm.weight for norm in norms]
    kernels = kernels_for(x, *weights)
    if kernels is None or not torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return None
    if any(weight.requires_grad for weight in weights) or not kernels.attends(attention.head_dim):
        return None
    if not attention.takes(x, **inputs):
        return None
    groups = []
    for linears in (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    ):
        parts = adapted_parts(linears)
        if parts is None or not low_rank.compiles(kernels, parts):
            return None
        groups.append(parts)
    scale, window = attention._attention_options
    rows = rows_of(tuple(inputs["cu_seq_lens_q"].tolist()), window, scale)
    rotation = rotation_of(*inputs["position_embeddings"])
    return _Layer(tuple(groups), norms, rows, rotation, attention.head_dim, kernels)


def install(model: nn.Module, *, check: bool = True) -> int:
    """Change the decoder layers of `model` that are made of what is fused; return how many.

    `check` off changes layers that look alike without comparing numbers, for tensors that have
    none.
    """
    changed = 0
    for layer in list(model.modules()):
        if _looks_alike(layer) and (not check or _is_sum_of_parts(layer)):
            kind: Any = type(layer)
            layer.__class__ = with_forward(_FusedDecoderLayer, kind)
            changed += 1
    return changed


def _looks_alike(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != CHILDREN:
        return False
    attention = layer.self_attn
    return (
        isinstance(attention, RotaryBlockAttention)
        and not hasattr(attention, "q_norm")
        and isinstance(layer.mlp, GatedMLP)
        and isinstance(layer.input_layernorm, RMSNorm)
        and isinstance(layer.post_attention_layernorm, RMSNorm)
        and not isinstance(layer, _FusedDecoderLayer)
    )


@torch.no_grad()
def _is_sum_of_parts(layer: Any) -> bool:
    """Whether the layer adds up its parts as ours does; nothing is multiplied or left out."""
    hidden, inputs = probe_inputs(layer.self_attn)
    was_training = layer.training
    layer.eval()
    try:
        y = hidden + layer.self_attn(layer.input_layernorm(hidden), **inputs)[0]
        wanted = y + layer.mlp(layer.post_attention_layernorm(y))
        found = layer(hidden, **inputs)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        return False  # called in another way than layers that we know
    finally:
        layer.train(was_training)
    return isinstance(found, Tensor) and torch.equal(found, wanted)
