"""Small models with real head sizes and two layers, so that a CPU checks them in a second."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xtuner.testing.tiny import tiny_model_folder
from xtuner.types import IGNORE_INDEX, Batch

LAYERS = 2
_SMALL: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "vocab_size": 512,
    "initializer_range": 0.05,  # with the usual 0.02 all tokens are equally likely, whatever leaks
}
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads of 128": (
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    ),
    "heads of 64": (
        "llama",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64},
    ),
    "windows of 48": (
        "mistral",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 48,
        },
    ),
}
LENGTHS = (5, 64, 131, 1, 100)
"""Sample lengths of a row: shorter and longer than the window, and a single token."""


def small_model(folder: Path, name: str, *, tiny: bool) -> Path:
    """Write the model `name` of HEADS below `folder`, in bfloat16; return its folder."""
    base_dir = folder / "small" / name.replace(" ", "-")
    if not (base_dir / "config.json").exists():
        kind, heads = HEADS[name]
        sizes: Mapping[str, Any] = _SMALL
        if tiny:
            heads = {**heads, "num_attention_heads": 2, "num_key_value_heads": 1}
            sizes = {**_SMALL, "hidden_size": 128, "intermediate_size": 256}
        tiny_model_folder(base_dir, kind, **{**sizes, **heads})
        _in_bfloat16(base_dir)
    return base_dir


def _in_bfloat16(base_dir: Path) -> None:
    """Round weights so that float32 and 16-bit runs start with the same values."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.bfloat16)
    model.save_pretrained(base_dir)


def batch_of(lengths: tuple[int, ...], *, vocabulary: int = 512, seed: int = 0) -> Batch:
    """A row of random samples; three fifths of each are supervised."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(0, vocabulary, (1, total), generator=draw)
    labels = ids.masked_fill(torch.rand(1, total, generator=draw) > 0.6, IGNORE_INDEX)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels[0, cu_seqlens[:-1].long()] = IGNORE_INDEX
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return Batch(ids, labels, positions, cu_seqlens)
