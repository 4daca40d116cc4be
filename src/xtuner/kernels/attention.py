"""Attention over samples that lie end to end in one row and cannot see each other.

Registered in transformers' attention interface as ``xtuner``; it takes the borders of the samples
(`cu_seq_lens_q`) instead of a mask, so no work is spent on pairs of tokens of different samples
(four fifths of a packed row of 1,024 at 200 tokens a sample). A call without borders is an error,
never a leaking mask. Which kernel does the work:

- a GPU, in 16 bits: flash attention over cumulative lengths, torch's own (`varlen_attn`) or that of
  the flash-attn package;
- a CPU: `cpu_attention`;
- else, and with dropout or a soft cap of the scores: one call of torch's attention a sample.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from xtuner.errors import ModelError
from xtuner.kernels.block_attention import cpu_attention

NAME = "xtuner"


def sample_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within one sample.

    Args:
        query: ``[1, heads, T, head_dim]``.
        key: ``[1, kv_heads, T, head_dim]``; query head h reads kv head ``h // (heads / kv_heads)``.
        value: as `key`.
        scaling: factor of the scores.
        dropout: share of attention weights set to zero.
        window: a token sees itself and the ``window - 1`` tokens before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.

    Returns:
        ``[1, heads, T, head_dim]``.
    """
    length = query.shape[-2]
    grouped = query.shape[1] != key.shape[1]
    windowed = window is not None and length > window
    if softcap is None:
        mask = _window_mask(length, window, query.device) if windowed else None
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            mask,
            dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scaling / softcap))
    scores = scores.masked_fill(~_window_mask(length, window, query.device), -math.inf)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def flash_kernel(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> Any:
    """Flash attention over cumulative lengths, or None where `device` has none for these tensors.

    The kernel takes ``(query [N, heads, D], key, value, borders on the device, longest sample,
    scale, window)``.
    """
    return _choice(device, dtype, width, value_width)[0]


@cache
def _choice(
    device: torch.device, dtype: torch.dtype, width: int, value_width: int
) -> tuple[Any, str]:
    """The kernel, or None and why."""
    if device.type != "cuda":
        return None, f"a {device.type} has none"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None, "this GPU is older than Ampere"
    if dtype not in (torch.bfloat16, torch.float16):
        return None, f"it takes 16 bits and not {str(dtype).removeprefix('torch.')}"
    if width != value_width or width > 256:
        return None, f"it does not take heads of {width} and values of {value_width} numbers"
    if _flash_attn_function() is not None:
        return _flash_attn_package, ""
    if width % 8:
        return None, f"torch's takes heads of a multiple of 8 numbers, not of {width}"
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        if {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
            return _torch_varlen, ""
    return None, "this torch has none and the package flash-attn is not installed"


@cache
def _flash_attn_function() -> Any:
    """That of the package flash-attn, or None. A folder of that name, or a build for another
    torch, is found like a package but cannot be imported."""
    try:
        from flash_attn import (  # type: ignore[import-not-found, unused-ignore]
            flash_attn_varlen_func,
        )
    except (ImportError, OSError):
        return None
    return flash_attn_varlen_func


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seq_lens_q: Tensor,
    scale: float,
    window: int | None,
    max_length_q: int | None = None,
    **_: Any,
) -> Tensor:
    """Attention by `flash_kernel`, which must not be None: query ``[N, heads, D]`` to the same;
    the other arguments are those with which transformers calls an attention layer."""
    kernel = flash_kernel(query.device, query.dtype, query.shape[-1], value.shape[-1])
    longest = max_length_q or int(cu_seq_lens_q.diff().max())
    borders = _on_device(cu_seq_lens_q, query.device)
    out: Tensor = kernel(query, key, value, borders, longest, scale, window)
    return out


def _torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None else window - 1
    return varlen_attn(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash_attn_package(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Any:
    back = -1 if window is None else window - 1
    return _flash_attn_function()(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        window_size=(back, 0),
    )


_borders_on_device: list[tuple[Tensor, Tensor]] = []


def _on_device(borders: Tensor, device: torch.device) -> Tensor:
    """`borders` copied to `device` once for all layers, which get the same tensor."""
    if not _borders_on_device or _borders_on_device[0][0] is not borders:
        _borders_on_device[:] = [(borders, borders.to(device, non_blocking=True))]
    return _borders_on_device[0][1]


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


class Watch:
    """Collects the options with which layers call `packed_attention`, while it is entered."""

    active: Watch | None = None

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __enter__(self) -> Watch:
        Watch.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Watch.active = None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `query` ``[1, heads, N, head_dim]`` to ``[1, N, heads,
    head_dim]``.

    Raises:
        ModelError: the borders of the samples are missing, or the layer asks for what is not built
            here.
    """
    if Watch.active is not None:
        Watch.active.calls.append({**kwargs, "scaling": scaling, "dropout": dropout})
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None or attention_mask is not None or query.shape[0] != 1:
        raise ModelError(
            "xtuner's attention needs one row and the borders of its samples, and got none: "
            "set attn_implementation = 'sdpa' for this model"
        )
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise ModelError(
            f"this model's attention ({type(module).__name__}) uses "
            f"{', '.join(unknown) or 'no causal order'}, "
            "which xtuner's attention lacks: set attn_implementation = 'eager'"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    slow = "flash attention has no dropout" if dropout else "flash attention has no soft cap"
    if not dropout and softcap is None:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, head_dim]
        if query.device.type == "cpu":
            ends = tuple(borders.tolist())
            return cpu_attention(q, k, v, ends, scale=scaling, window=window)[None], None
        kernel, why = _choice(query.device, query.dtype, query.shape[-1], value.shape[-1])
        slow = f"flash attention cannot be used: {why}"
        if kernel is not None:
            return flash(q, k, v, scale=scaling, window=window, **kwargs)[None], None
    if query.device.type != "cpu":
        _tell_once(slow)
    outputs = [
        sample_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            scaling=scaling,
            dropout=dropout,
            window=window,
            softcap=softcap,
        ).transpose(1, 2)
        for start, end in itertools.pairwise(borders.tolist())
    ]
    return (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()), None


@cache
def _tell_once(why: str) -> None:
    warnings.warn(
        f"attention goes sample by sample, slower and with more memory: {why}", stacklevel=2
    )


def register() -> str:
    """Make the name ``xtuner`` known to transformers and return it.

    It gets no function for masks: transformers then builds none, and does not look for borders of
    samples in the positions either, for which a GPU would have to be waited for at every step.
    """
    AttentionInterface.register(NAME, packed_attention)
    return NAME


def training_implementation(model: PreTrainedModel, wanted: str) -> str:
    """The attention to train `model` with: xtuner's for 'auto', where the model takes it.

    Raises:
        ModelError: the model cannot keep packed samples apart with any attention known here.
    """
    if wanted != "auto":
        return wanted
    if not model._supports_attention_backend:  # upstream's flag for the attention interface
        raise ModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so samples "
            "in one row could "
            "see each other: set pack_to_max_length = False, batch_size = 1 and "
            "attn_implementation = 'eager'"
        )
    return register()
