"""Which models can be trained on several samples in one row.

The decision is needed before data are laid out, so before weights are there, and rests on what an
architecture says of itself; `PackedCausalLM.verify` then shows on the loaded weights that it is
right. What cannot be packed is trained one sample at a time, by transformers' plainest call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from xtuner.config.schema import Settings
from xtuner.errors import ConfigError
from xtuner.kernels.attention.packed import NAME, register
from xtuner.models.facts import facts_of

ISOLATING_KINDS = frozenset({"full_attention", "sliding_attention", "attention", "mlp", "moe"})
"""Kinds of layers (`config.layer_types`) in which a token reads others only through attention over
`cu_seqlens`. Others (linear attention, convolutions, attention in chunks) carry on or count through
the row."""


def why_apart(model: Any) -> str | None:
    """Why `model` (of transformers; values do not matter) needs each sample alone; None if not."""
    if getattr(model, "_is_stateful", False):
        return "it carries a state from token to token"
    if not getattr(model, "_supports_attention_backend", False):
        return "it does not use transformers' attention interface"
    text = model.config.get_text_config()
    kinds = {
        *(getattr(text, "layer_types", None) or ()),
        *(getattr(text, "layers_block_type", None) or ()),
    }
    if others := sorted(kinds - ISOLATING_KINDS):
        return f"it has layers of the kind {', '.join(others)}"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return "it has convolutions along the row"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks, which attention over packed samples lacks"
    return None


def cannot_split(model: Any, size: int) -> str | None:
    """Why the rows of `model` (of transformers; values do not matter) cannot be shared by `size`
    processes; None if they can."""
    if reason := why_apart(model):
        return f"the rows of {type(model).__name__} cannot be split: {reason}; set it to 1"
    text = model.config.get_text_config()
    if (implementation := text._attn_implementation) != NAME:
        return (
            f"attn_implementation = {implementation!r} takes entire rows; set it to 'auto', or "
            "sequence_parallel_size = 1"
        )
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads < size:
        return f"{type(model).__name__} has {heads} attention heads, so it may be at most {heads}"
    return None


def resolve_packing(settings: Settings) -> tuple[Settings, str | None]:
    """Decide `pack_to_max_length = 'auto'` for the model of a run.

    Returns:
        Settings with True or False, and a line to say where the model decided against packing.

    Raises:
        ConfigError: packing was asked for and the model cannot keep samples apart.
        ModelError: the model's configuration cannot be had.
    """
    if settings.pack_to_max_length is False:
        return settings, None
    model = facts_of(settings).model
    reason = why_apart(model)
    if reason is None:
        return settings.model_copy(update={"pack_to_max_length": True}), None
    if settings.pack_to_max_length is True:
        raise ConfigError(
            f"pack_to_max_length = True: {type(model).__name__} cannot keep samples in one row "
            f"apart: {reason}. Set pack_to_max_length = False, or leave it out: the samples then "
            "go through the model one at a time"
        )
    line = f"not packed: {type(model).__name__} takes one sample at a time, for {reason}"
    return settings.model_copy(update={"pack_to_max_length": False}), line


def training_implementation(model: PreTrainedModel, wanted: str) -> str:
    """The attention to train `model` with: xtuner's for 'auto' where the model takes it, else what
    transformers chose."""
    if wanted != "auto":
        return wanted
    if why_apart(model) is not None:
        return str(model.config.get_text_config()._attn_implementation)
    return register()
