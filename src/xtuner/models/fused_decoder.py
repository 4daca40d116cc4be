"""Decoder layers of a CPU with LoRA on all their linear layers as one operation each way.

    y = x + W_o attention(norm(x) W_qkv),   out = y + W_d (silu(norm(y) W_g) * norm(y) W_u)

One compiled call (`cpu_decoder`) does what the parts of the layer do one by one (`fused_layers`,
`fused_attention`, `low_rank`). Autograd has one operation instead of ten, Python has little to do,
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

from xtuner.models import cpu_decoder, low_rank
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
        parts: the linear layers, together where they take the same input: queries, keys and
            values; the output of attention; gate and up; down.
        norms: before attention and before the gated MLP.
        rows: who sees whom.
        rotation: cosines and sines of the positions.
        heads: how many of queries, how many of keys, and their width.
        kernels: those of bfloat16.
    """

    parts: tuple[Sequence[Adapted], ...]
    norms: tuple[RMSNorm, RMSNorm]
    rows: Rows
    rotation: Rotation
    heads: tuple[int, int, int]
    kernels: Kernels

    def adapters(self) -> list[Tensor]:
        """All A and all B of each group, in the order of their gradients."""
        pairs = [([p.down for p in group], [p.up for p in group]) for group in self.parts]
        return [tensor for downs, ups in pairs for tensor in (*downs, *ups)]

    def tensors(self, dtype: torch.dtype) -> cpu_decoder.Layer:
        """All of it as the compiled functions take it."""
        first, second = self.norms
        return cpu_decoder.Layer(
            norms=(first.weight, second.weight),
            eps=(first.variance_epsilon, second.variance_epsilon),
            groups=[[low_rank.layer_of(part, dtype) for part in group] for group in self.parts],
            rows=self.rows,
            rotation=self.rotation,
            heads=self.heads,
        )


class _DecoderLayer(torch.autograd.Function):
    """``[1, N, H]`` to ``[1, N, H]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: _Layer, *adapters: Tensor) -> Tensor:
        x, tensors = hidden[0], layer.tensors(hidden.dtype)
        out, saved, call = cpu_decoder.forward(layer.kernels, x, tensors)
        ctx.save_for_backward(x, saved, *adapters)  # these for autograd to see them changed
        ctx.layer, ctx.call, ctx.kernels = tensors, call, layer.kernels
        return out[None]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, saved, *_ = ctx.saved_tensors
        pull, needed = grads[0][0].contiguous(), ctx.needs_input_grad[0]
        grad, of_adapters = cpu_decoder.backward(
            ctx.kernels, x, ctx.layer, saved, ctx.call, pull, grad_x=needed
        )
        return (None if grad is None else grad[None], None, *of_adapters)


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
    width = attention.head_dim
    heads = (len(groups[0][0].up) // width, len(groups[0][1].up) // width, width)
    return _Layer(tuple(groups), norms, rows, rotation, heads, kernels)


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
