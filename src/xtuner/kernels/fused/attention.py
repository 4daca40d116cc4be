"""Attention layers with fused rotary embedding and attention.

transformers rotates queries and keys in a dozen passes over memory and then transposes them for the
attention function. A layer changed by `install` passes the outputs of the projections directly to
`cpu_attention`, which rotates while it packs them, or on a GPU to Liger's in-place rotation and
flash attention. Weights and names of the layer do not change, and its original forward pass runs
wherever the fused one does not apply (with a cache, a mask or dropout, or without these kernels).
Only layers that give the same results on a fixed input are changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.device.heap import trim_if_grown
from xtuner.device.select import half_dtype
from xtuner.kernels.attention import packed, varlen
from xtuner.kernels.attention.blocks import cpu_attention
from xtuner.kernels.attention.call import AttentionCall
from xtuner.kernels.compiled import Rotation, kernels_for
from xtuner.kernels.fused.forward_override import with_forward
from xtuner.kernels.fused.liger import Liger, liger_for
from xtuner.kernels.lora.layers import project

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS = {"q_norm", "k_norm"}


class RotaryBlockAttention:
    """The forward pass of a rotary attention layer over packed rows."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``[1, N, H]`` to ``[1, N, H]``."""
        kwargs |= {
            "position_embeddings": position_embeddings,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
        }
        width = self.head_dim
        if not self.takes(hidden_states, **kwargs) or not _has_kernels(hidden_states):
            return super().forward(hidden_states, **kwargs)  # type: ignore[misc, no-any-return]
        projected = project(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.view(hidden_states.shape[1], -1, width) for x in projected)
        if hasattr(self, "q_norm"):
            # under autocast a norm with a float32 weight returns float32, while v has 16 bits
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        scale, window = self._attention_options
        rotation = rotation_of(*position_embeddings)  # type: ignore[misc]
        if q.device.type == "cuda":
            q, k = _liger(q).rotate(q, k, *rotation)
            call = _call_of(self, q.device, q.dtype)
            longest, cu_seqlens = kwargs.get("max_length_q"), kwargs["cu_seq_lens_q"]
            out = varlen.attend(q, k, v, call, cu_seqlens=cu_seqlens, longest=longest)
            assert out is not None  # checked by `takes`
        else:
            ends = tuple(kwargs["cu_seq_lens_q"].tolist())
            out = cpu_attention(q, k, v, ends, scale=scale, window=window, rotation=rotation)
        return self.o_proj(out.flatten(1)[None]), None

    def takes(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> bool:
        """Whether the input is a packed row and the fused forward pass supports the call."""
        return (
            kwargs.get("cu_seq_lens_q") is not None
            and kwargs.get("sequence_group") is None
            and position_embeddings is not None
            and attention_mask is None
            and past_key_values is None
            and hidden_states.shape[0] == 1
            and position_embeddings[0].shape[-1] == self.head_dim
            and not (self.training and self.attention_dropout)
            and self.config._attn_implementation == packed.NAME
            and _attends(self, hidden_states)
        )


def _has_kernels(x: Tensor) -> bool:
    """Whether a kernel for the rotation is available."""
    return (liger_for(x) if x.device.type == "cuda" else kernels_for(x)) is not None


def _attends(layer: Any, x: Tensor) -> bool:
    """Whether there is an attention kernel for `layer` on the device of `x`."""
    if x.device.type != "cuda":
        return True
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else x.dtype
    return varlen.choose(_call_of(layer, x.device, dtype)).kernel is not None


def _call_of(layer: Any, device: torch.device, dtype: torch.dtype) -> AttentionCall:
    width = layer.head_dim
    heads, kv_heads = (p.out_features // width for p in (layer.q_proj, layer.k_proj))
    scale, window = layer._attention_options
    return AttentionCall(device, dtype, heads, kv_heads, width, width, scale, window)


def _liger(x: Tensor) -> Liger:
    found = liger_for(x)
    assert found is not None  # checked by `_has_kernels`
    return found


@lru_cache(maxsize=2)
def rotation_of(cos: Tensor, sin: Tensor) -> Rotation:
    """Convert transformers' position embeddings ``[1, N, D]``; all layers share the result."""
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def install(model: nn.Module, *, check: bool = True) -> int:
    """Fuse the attention layers of `model` whose results do not change; return their number.

    `check` = False skips the comparison of results, for meta tensors.
    """
    changed = 0
    for layer in list(model.modules()):
        if not _has_same_structure(layer):
            continue
        candidate: Any = layer
        real = not candidate.q_proj.weight.is_meta
        if real and not _has_kernels(_probe(layer)):
            continue
        if check:
            changed += _change_if_same(layer)
            trim_if_grown()
        else:
            general = getattr(layer.config, "sliding_window", None)
            scale: Any = layer.scaling
            _change(layer, scale, getattr(layer, "sliding_window", general))
            changed += 1
    return changed


def _has_same_structure(layer: Any) -> bool:
    names = {name for name, _ in layer.named_children()}
    return (
        PROJECTIONS <= names <= PROJECTIONS | NORMS
        and len(names & NORMS) in (0, 2)
        and isinstance(getattr(layer, "head_dim", None), int)
        and all(_is_per_head(getattr(layer, name), layer.head_dim) for name in names & NORMS)
        and isinstance(getattr(layer, "scaling", None), float)
        and isinstance(getattr(layer, "attention_dropout", None), float)
        and getattr(layer, "is_causal", False) is True
        and not isinstance(layer, RotaryBlockAttention)
    )


def _is_per_head(norm: nn.Module, width: int) -> bool:
    """Whether `norm` normalizes each head by itself, as in Qwen3; OLMo2 normalizes all at once."""
    weight = getattr(norm, "weight", None)
    return isinstance(weight, Tensor) and weight.shape[-1] == width


def _probe(layer: Any) -> Tensor:
    """A fixed input of twelve rows, of the magnitude of normalized activations."""
    width, weight = layer.q_proj.in_features, layer.q_proj.weight
    dtype = weight.dtype if weight.is_floating_point() else half_dtype(weight.device.type)
    count = torch.arange(12 * width, dtype=torch.float32)
    return torch.sin(count * 12.9898).view(1, 12, width).to(weight.device, dtype)


def _change(layer: Any, scale: float, window: int | None) -> None:
    kind: Any = type(layer)
    layer.__class__ = with_forward(RotaryBlockAttention, kind)
    layer._attention_options = scale, window


def probe_inputs(layer: Any) -> tuple[Tensor, dict[str, Any]]:
    """Hidden states of two packed samples, and the other arguments of a layer."""
    hidden = _probe(layer)
    angles = torch.arange(12 * layer.head_dim // 2, dtype=torch.float32).view(1, 12, -1)
    angles = torch.cat([angles, angles], -1).to(hidden.device)
    inputs: dict[str, Any] = {
        "position_embeddings": (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)),
        "attention_mask": None,
        "cu_seq_lens_q": torch.tensor([0, 5, 12], dtype=torch.int32),
    }
    return hidden, inputs


@contextmanager
def trial(layer: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; an error ends the block, as a layer may have another
    signature."""
    was_training = layer.training
    layer.eval()
    try:
        with torch.no_grad():
            yield
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
        pass
    finally:
        layer.train(was_training)


def _change_if_same(layer: Any) -> bool:
    hidden, inputs = probe_inputs(layer)
    before, same = type(layer), False
    with trial(layer):
        with packed.CallRecorder() as watch:
            wanted = layer(hidden, **inputs)[0]
        (call,) = watch.calls
        if not any(call.get(name) for name in ("softcap", "s_aux", "position_bias")):
            scale = layer.head_dim**-0.5 if call["scaling"] is None else call["scaling"]
            _change(layer, scale, call.get("sliding_window"))
            same = _close(layer(hidden, **inputs)[0], wanted)
    if not same:
        layer.__class__ = before
    return same


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Compare with a tolerance of a few percent in 16 bits, where the two round differently;
    another kind of rotation changes the result completely."""
    limit = 1e-5 if ours.dtype == torch.float32 else 0.1
    ours, theirs = ours.float(), theirs.float()
    return bool((ours - theirs).norm() <= limit * theirs.norm())
