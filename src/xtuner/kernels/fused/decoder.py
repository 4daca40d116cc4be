"""Decoder layers with LoRA on all linear layers as one operation per direction on a CPU.

    y = x + W_o attention(norm(x) W_qkv),   out = y + W_d (silu(norm(y) W_g) * norm(y) W_u)

One compiled call (`kernels.cpu.decoder`) replaces the calls for the parts of the layer (`norm_mlp`,
`attention`, `lora.linear`): one autograd operation instead of ten, little Python overhead, and both
residual additions are fused into a product or the gradient of a norm. `install` changes only layers
whose output equals this composition bit for bit; the original forward pass runs wherever the fused
one does not apply (dropout, recomputation, other adapters, trained norms, a cache, no compiler).
The parts are not called as modules, so forward hooks on them do not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xtuner.device.heap import trim_if_grown
from xtuner.kernels.compiled import Kernels, decoder, kernels_for, rows_of
from xtuner.kernels.fused.attention import RotaryBlockAttention, probe_inputs, rotation_of, trial
from xtuner.kernels.fused.forward_override import with_forward
from xtuner.kernels.fused.norm_mlp import GatedMLP, RMSNorm
from xtuner.kernels.lora import linear
from xtuner.kernels.lora.layers import adapted_parts

CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


class _DecoderLayer(torch.autograd.Function):
    """``[1, N, H]`` to ``[1, N, H]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, layer: Any, kernels: Kernels, *adapters: Tensor
    ) -> Tensor:
        x = hidden[0]
        out, saved, call = decoder.forward(kernels, x, layer)
        ctx.save_for_backward(x, saved, *adapters)  # autograd then detects in-place changes
        ctx.layer, ctx.call, ctx.kernels = layer, call, kernels
        result: Tensor = out[None]
        return result

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, saved, *_ = ctx.saved_tensors
        grad_output, needed = grads[0][0].contiguous(), ctx.needs_input_grad[0]
        grad_x, adapter_grads = decoder.backward(
            ctx.kernels, x, ctx.layer, saved, ctx.call, grad_output, grad_x=needed
        )
        return (None if grad_x is None else grad_x[None], None, None, *adapter_grads)


class _FusedDecoderLayer:
    """The forward pass of a decoder layer, as one operation where possible."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Map ``[1, N, H]`` to ``[1, N, H]``."""
        kernels = kernels_for(hidden_states)
        layer = None if args or kernels is None else _layer_of(self, hidden_states, kernels, kwargs)
        if layer is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        adapters = layer.adapters()
        return _DecoderLayer.apply(hidden_states, layer, kernels, *adapters)  # type: ignore[no-untyped-call]


def _layer_of(layer: Any, x: Tensor, kernels: Kernels, inputs: dict[str, Any]) -> Any | None:
    """The arguments of the fused operation; None if the parts have to run one by one."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    weights = [norm.weight for norm in norms]
    if kernels_for(x, *weights) is None or not torch.is_grad_enabled():
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
        if parts is None or not linear.can_compile(kernels, parts):
            return None
        groups.append([linear.layer_of(part, x.dtype) for part in parts])
    scale, window = attention._attention_options
    width, (queries, keys, _) = attention.head_dim, groups[0]
    return decoder.Layer(
        norms=(weights[0], weights[1]),
        eps=(norms[0].variance_epsilon, norms[1].variance_epsilon),
        groups=groups,
        rows=rows_of(tuple(inputs["cu_seq_lens_q"].tolist()), window, scale),
        rotation=rotation_of(*inputs["position_embeddings"]),
        heads=(len(queries.up) // width, len(keys.up) // width, width),
    )


def install(model: nn.Module, *, check: bool = True) -> int:
    """Fuse the decoder layers of `model` whose parts are already fused; return their number.

    `check` = False skips the comparison of results, for meta tensors.
    """
    changed = 0
    for layer in list(model.modules()):
        if _has_same_structure(layer) and (not check or _is_sum_of_parts(layer)):
            kind: Any = type(layer)
            layer.__class__ = with_forward(_FusedDecoderLayer, kind)
            changed += 1
            trim_if_grown()
    return changed


def _has_same_structure(layer: Any) -> bool:
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


def _is_sum_of_parts(layer: Any) -> bool:
    """Whether the layer is exactly the residual sum of its parts, without further operations."""
    hidden, inputs = probe_inputs(layer.self_attn)
    with trial(layer):
        y = hidden + layer.self_attn(layer.input_layernorm(hidden), **inputs)[0]
        wanted = y + layer.mlp(layer.post_attention_layernorm(y))
        found = layer(hidden, **inputs)
        return isinstance(found, Tensor) and torch.equal(found, wanted)
    return False
