"""InternLM2 and 2.5: Llama with other tensor names and a fused, grouped `wqkv`.

    checkpoint (wqkv, wo, ...) ──rename, split──► LlamaForCausalLM ──fuse, rename──► checkpoint

The remote code of these checkpoints (2024) gives wrong rotary buffers under transformers 5
(https://github.com/huggingface/transformers/issues/48892) and is never run. Saving restores the
original layout bit for bit; ``save_pretrained(save_original_format=False)`` writes Llama's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ConversionOps, LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from xtuner.models.families.internlm import InternLMConfig

MODEL_TYPES = ("internlm2",)

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_RENAMINGS = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    r"^output\.": r"lm_head\.",
}


class InternLM2Config(InternLMConfig):
    """Llama's configuration with InternLM2's names (`bias`, `rope_scaling`)."""

    model_type = "internlm2"

    def to_dict(self) -> dict[str, Any]:
        """The configuration in the format of InternLM2's config.json."""
        values: dict[str, Any] = super().to_dict()
        rope = dict(values.pop("rope_parameters", None) or {})
        values["rope_theta"] = rope.pop("rope_theta", self.default_theta)
        kind = rope.pop("rope_type", "default")
        rope.pop("type", None)
        values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        # Remote code without a repository name would be looked up next to the weights, where it is
        # missing.
        remote = {k: v for k, v in (values.pop("auto_map", None) or {}).items() if "--" in str(v)}
        return {**values, "auto_map": remote} if remote else values


class InternLM2ForCausalLM(LlamaForCausalLM):
    """Llama under the class name in InternLM2's checkpoints."""

    config_class = InternLM2Config
    config: InternLM2Config


class SplitGroups(ConversionOps):
    """Split a fused `wqkv` (weight or bias) into q, k and v.

    With g = heads / kv_heads, axis 0 of `wqkv` is ``[kv_heads, g + 2, head_dim]``: for each kv head
    its g query heads, then one key and one value head.
    """

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the tensors of the three targets, each ``[heads * head_dim, ...]``."""
        config = kwargs["config"]
        (fused,) = (_single(value) for value in input_dict.values())
        groups = config.num_attention_heads // config.num_key_value_heads
        parts = fused.unflatten(0, (config.num_key_value_heads, groups + 2, config.head_dim))
        split = parts[:, :groups], parts[:, groups : groups + 1], parts[:, groups + 1 :]
        return {
            name: part.flatten(0, 2).contiguous()
            for name, part in zip(target_patterns, split, strict=True)
        }

    @property
    def reverse_op(self) -> ConversionOps:
        """The conversion for saving."""
        return FuseGroups()


class FuseGroups(ConversionOps):
    """Fuse q, k and v into `wqkv`: the inverse of `SplitGroups`."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the one fused tensor."""
        config = kwargs["config"]
        parts = [
            _single(input_dict[name]).unflatten(
                0, (config.num_key_value_heads, -1, config.head_dim)
            )
            for name in source_patterns
        ]
        return {target_patterns[0]: torch.cat(parts, dim=1).flatten(0, 2).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        """The conversion for loading."""
        return SplitGroups()


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def register() -> None:
    """Register InternLM2 with transformers' Auto classes; idempotent."""
    AutoConfig.register("internlm2", InternLM2Config, exist_ok=True)
    AutoModelForCausalLM.register(InternLM2Config, InternLM2ForCausalLM, exist_ok=True)
    renamings = [WeightRenaming(old, new) for old, new in _RENAMINGS.items()]
    fused = WeightConverter(
        source_patterns="attention.wqkv", target_patterns=list(QKV), operations=[SplitGroups()]
    )
    register_checkpoint_conversion_mapping("internlm2", [*renamings, fused], overwrite=True)
