"""Decides which models can be trained on several samples in one row. The decision is needed before
data are packed, so before weights are loaded, and relies on what an architecture declares;
`PackedCausalLM.verify` later confirms it with the loaded weights. Other models are trained one
sample at a time, with a plain transformers call.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from xtuner.config.schema import Settings
from xtuner.errors import ConfigError, count
from xtuner.kernels.attention.packed import NAME, register
from xtuner.models.facts import facts_of

ISOLATING_KINDS = frozenset({"full_attention", "sliding_attention", "attention", "mlp", "moe"})
"""Layer types (`config.layer_types`) in which a token reads others only through attention over
`cu_seqlens`. Others (linear attention, convolutions, chunked attention) carry state or count
positions along the row."""


def why_apart(model: Any) -> str | None:
    """Why the transformers model `model` must process samples separately; None if it need not.
    Weights are not used."""
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
        return f"it has layers of type {', '.join(others)}"
    if any(isinstance(module, torch.nn.Conv1d) for module in model.modules()):
        return "it has convolutions along the row"
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "its attention has sinks, which attention over packed samples does not support"
    return None


def cannot_split(model: Any, size: int) -> str | None:
    """Why the rows of the transformers model `model` cannot be shared by `size` processes; None if
    they can. Weights are not used."""
    if reason := why_apart(model):
        return f"the rows of {type(model).__name__} cannot be split: {reason}; set it to 1"
    text = model.config.get_text_config()
    if (implementation := text._attn_implementation) != NAME:
        return (
            f"attn_implementation = {implementation!r} needs entire rows; set it to 'auto', or "
            f"sequence_parallel_size = 1"
        )
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads < size:
        held = count(heads, "attention head")
        return f"{type(model).__name__} has {held}, so the maximum is {heads}"
    return None


def resolve_packing(settings: Settings) -> tuple[Settings, str | None]:
    """Resolve `pack_to_max_length = 'auto'` for the run's model.

    Returns:
        Settings with True or False, and a line if the model does not support packing.

    Raises:
        ConfigError: Packing was requested and the model cannot separate samples.
        ModelError: The model's configuration is not available.
    """
    if settings.pack_to_max_length is False:
        return settings, None
    model = facts_of(settings).model
    reason = why_apart(model)
    if reason is None:
        return settings.model_copy(update={"pack_to_max_length": True}), None
    if settings.pack_to_max_length is True:
        raise ConfigError(
            f"pack_to_max_length = True: {type(model).__name__} cannot separate samples in one "
            f"row: {reason}. Set pack_to_max_length = False, or remove it: the model then takes "
            f"one sample at a time"
        )
    line = f"not packed: {type(model).__name__} takes one sample at a time, because {reason}"
    return settings.model_copy(update={"pack_to_max_length": False}), line


def training_implementation(model: PreTrainedModel, wanted: str) -> str:
    """The attention to train `model` with: for 'auto' xtuner's if the model supports it, otherwise
    the choice of transformers."""
    if wanted != "auto":
        return wanted
    if why_apart(model) is not None:
        return str(model.config.get_text_config()._attn_implementation)
    return register()
