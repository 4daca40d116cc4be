"""Write an adapter of InternLM2 for its own layers, which fuse q, k and v into ``wqkv``.

    q_proj: A_q, B_q            wqkv: A = [A_q; A_k; A_v]
    k_proj: A_k, B_k    ──►           B = the rows of wqkv, with B_q, B_k, B_v in their columns
    v_proj: A_v, B_v

The product B A is the same, so the adapter is; the rank of ``wqkv`` is the sum of the three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xtuner.models.families.internlm2 import QKV, FuseGroups

_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_ATTENTION = re.compile(r"(.*\.)self_attn\.([qkv])_proj\.lora_A\.weight")
_FUSED = "attention.wqkv"


def original_adapter(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """`config` and `tensors` for InternLM2's own layers.

    Args:
        config: adapter_config.json.
        tensors: The adapter's tensors by Llama's names.
        base: Config.json of the base model.

    Returns:
        None if the base model is not an InternLM2 in its original layout, or if the adapter has
        anything but matrices of one rank for linear layers.
    """
    others = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "lora_bias")
    if base.get("model_type") != "internlm2" or any(config.get(name) for name in others):
        return None
    if not all(re.search(r"\.lora_[AB]\.weight$", name) for name in tensors):
        return None
    shape = _Shape.of(base)
    found: dict[str, Tensor] = {}
    layers = sorted({match[1] for name in tensors if (match := _ATTENTION.match(name))})
    for layer in layers:
        name = f"{layer}{_FUSED}"
        down, up = _fuse(layer, tensors, shape)
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = down, up
    for name, tensor in tensors.items():
        if not re.search(r"self_attn\.[qkv]_proj\.", name):
            found[_original_name(name)] = tensor
    return _config_of(config, found), found


class _Shape:
    """The numbers that `FuseGroups` reads of a model's configuration."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        self.num_attention_heads = heads
        self.num_key_value_heads = kv_heads
        self.head_dim = head_dim

    @classmethod
    def of(cls, base: Mapping[str, Any]) -> _Shape:
        heads = int(base["num_attention_heads"])
        return cls(heads, int(base.get("num_key_value_heads") or heads),
                   int(base["hidden_size"]) // heads)  # fmt: skip

    def rows(self, letter: str) -> int:
        heads = self.num_attention_heads if letter == "q" else self.num_key_value_heads
        return heads * self.head_dim


def _fuse(layer: str, tensors: Mapping[str, Tensor], shape: _Shape) -> tuple[Tensor, Tensor]:
    """A and B of the fused layer; a projection without an adapter has zeros in B."""
    names = {letter: f"{layer}self_attn.{letter}_proj.lora_" for letter in "qkv"}
    downs = {x: tensors[f"{n}A.weight"] for x, n in names.items() if f"{n}A.weight" in tensors}
    first = next(iter(downs.values()))
    shared = all(torch.equal(down, first) for down in downs.values())
    down = first if shared else torch.cat(list(downs.values()))
    columns, blocks = 0, {}
    for letter in "qkv":
        block = first.new_zeros(shape.rows(letter), down.shape[0])
        if letter in downs:
            rank = downs[letter].shape[0]
            start = 0 if shared else columns
            block[:, start : start + rank] = tensors[f"{names[letter]}B.weight"]
            columns += rank
        blocks[letter] = block
    sources = {target: blocks[letter] for letter, target in zip("qkv", QKV, strict=True)}
    fused = FuseGroups().convert(sources, list(QKV), [_FUSED], config=shape)
    return down.contiguous(), fused[_FUSED]


def _original_name(name: str) -> str:
    for new, old in _NAMES.items():
        name = name.replace(new, old)
    return name.replace("lm_head", "output")


def _config_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in tensors}
    rank = int(config["r"])
    fused = next((t.shape[0] for n, t in tensors.items() if f"{_FUSED}.lora_A" in n), rank)
    factor = math.sqrt(fused / rank) if config.get("use_rslora") else fused / rank
    patterns: dict[str, Any] = {}
    if fused != rank:
        patterns = {
            "rank_pattern": {"wqkv": fused},
            "alpha_pattern": {"wqkv": config["lora_alpha"] * factor},
        }
    return {**config, "target_modules": sorted(layers), **patterns}
