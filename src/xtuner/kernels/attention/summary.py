"""Describe the attention of a run before its first step, from the model configuration."""

from __future__ import annotations

from typing import Any

import torch

from xtuner.kernels.attention import packed, varlen
from xtuner.kernels.attention.blocks import kernels_for_rows
from xtuner.kernels.attention.call import AttentionCall


def attention_line(
    config: Any, device: torch.device, dtype: torch.dtype, *, implementation: str = "auto"
) -> str:
    """Name the attention kernel of a training run, and why no faster one is used.

    Args:
        config: transformers configuration of the model.
        device: Device of the training run.
        dtype: Dtype of matrix products.
        implementation: The setting `attn_implementation`.
    """
    if implementation not in ("auto", packed.NAME):
        return f"transformers' {implementation} (attn_implementation)"
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    calls = calls_of(config.get_text_config(), device, dtype)
    lines = {call: _line(call) for call in calls}
    if len(set(lines.values())) == 1:
        return lines[calls[0]]
    windows = ((f"window {c.window:,}" if c.window else "no window", lines[c]) for c in calls)
    return "; ".join(f"layers with {window}: {line}" for window, line in windows)


def _line(call: AttentionCall) -> str:
    if call.device.type != "cpu":
        choice = varlen.choose(call)
        if choice.kernel is None:
            packed.reported.add(choice.why)
        return choice.line()
    if call.softcap is not None or call.dropout:
        unsupported = "dropout" if call.softcap is None else "softcap"
        reason = f"varlen attention on a CPU does not support {unsupported}"
        return f"one call per sample, because {reason}"
    kernels = kernels_for_rows(torch.empty(0, dtype=call.dtype))
    if kernels is not None and call.width == call.value_width and kernels.attends(call.width):
        return "compiled varlen attention"
    return "block-wise varlen attention" + (", compiled softmax" if kernels is not None else "")


def calls_of(text: Any, device: torch.device, dtype: torch.dtype) -> list[AttentionCall]:
    """The distinct attention calls of the layers of a language model in training."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(text, name, None)
        return default if value is None else value

    heads = get("num_attention_heads", 1)
    width = get("head_dim", get("hidden_size", heads) // heads)
    value_width, kv_heads = width, get("num_key_value_heads", heads)
    if get("kv_lora_rank") and (nope := get("qk_nope_head_dim")):  # DeepSeek
        width, value_width = nope + get("qk_rope_head_dim", 0), get("v_head_dim", nope)
    scale = get("query_pre_attn_scalar", width) ** -0.5
    scale = get("attention_multiplier", scale)
    return [
        AttentionCall(
            device, dtype, heads, kv_heads, width, value_width, scale,
            window, get("attn_logit_softcapping"), float(get("attention_dropout", 0.0)),
        )
        for window in _windows(text)
    ]  # fmt: skip


def _windows(text: Any) -> list[int | None]:
    """The sliding window of layers that have one, and None for layers without."""
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or ())
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return [None]
    if not kinds:
        return [window]
    found = [window] if "sliding_attention" in kinds else []
    return [*found, None] if "full_attention" in kinds or not found else found
