"""Attention over samples that lie end to end in one row and cannot see each other.

Registered in transformers' attention interface as ``xtuner``; it takes the boundaries of the
samples (`cu_seq_lens_q`) instead of a mask, so no work is spent on pairs of tokens of different
samples (four fifths of a packed row of 1,024 at 200 tokens a sample). A call without boundaries is
an error, never a leaking mask. Which kernel does the work:

- a GPU: flash attention over cumulative lengths, or memory-efficient attention for float32 and for
  GPUs without bfloat16 (`varlen_attention`);
- a CPU: `cpu_attention`;
- else, and on a CPU with dropout or a soft cap of the scores: one call a sample.
"""

from __future__ import annotations

import itertools
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from xtuner.errors import ModelError
from xtuner.kernels.attention import varlen
from xtuner.kernels.attention.blocks import cpu_attention
from xtuner.kernels.attention.call import AttentionCall

NAME = "xtuner"
SDPA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Keep torch's attention (SDPA) from cuDNN, which plans anew for each new length.

    A plan takes 160 ms on a Hopper card, where cuDNN comes first, and packed samples, validation
    and prompts have new lengths all the time. What the caller has turned off stays off.
    """
    if device.type != "cuda":
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.backends.cuda.cudnn_sdp_enabled():
        return nullcontext()  # within another one, which costs 12 us of host time
    return sdpa_kernel(SDPA_BACKENDS)


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
        ModelError: the boundaries of the samples are missing, or the layer asks for what is not
        built
            here.
    """
    if Watch.active is not None:
        Watch.active.calls.append({**kwargs, "scaling": scaling, "dropout": dropout})
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None or attention_mask is not None or query.shape[0] != 1:
        raise ModelError(
            "xtuner's attention needs one row and the boundaries of its samples, and got none: "
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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, head_dim]
    call = call_of(q, k, v, scale=scaling, window=window, softcap=softcap, dropout=dropout)
    if query.device.type == "cpu":
        if not dropout and softcap is None:
            ends = tuple(cu_seqlens.tolist())
            return cpu_attention(q, k, v, ends, scale=scaling, window=window)[None], None
    else:
        longest = kwargs.get("max_length_q")
        out = varlen.attend(q, k, v, call, cu_seqlens=cu_seqlens, longest=longest)
        if out is not None:
            return out[None], None
        _tell_once(varlen.choose(call).why)
    options = {"scaling": scaling, "dropout": dropout, "window": window, "softcap": softcap}
    return _by_sample(query, key, value, cu_seqlens.tolist(), **options), None


def _by_sample(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], **options: Any
) -> Tensor:
    """``[1, N, heads, head_dim]`` by one call of `sample_attention` a sample."""
    with without_cudnn(query.device):
        outputs = [
            sample_attention(*(x[:, :, start:end] for x in (query, key, value)), **options)
            for start, end in itertools.pairwise(ends)
        ]
    outputs = [out.transpose(1, 2) for out in outputs]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def call_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AttentionCall:
    """The call of a layer with queries ``[N, heads, D]``, keys and values ``[N, kv_heads, D]``."""
    return AttentionCall(
        query.device,
        query.dtype,
        *(query.shape[1], key.shape[1], query.shape[2], value.shape[2]),
        **options,
    )


told: set[str] = set()
"""Reasons for attention sample by sample that a run, or a warning, has told."""


def _tell_once(why: str) -> None:
    if why not in told:
        told.add(why)
        warnings.warn(
            f"attention goes sample by sample, slower and with more memory: {why}", stacklevel=2
        )


def register() -> str:
    """Make the name ``xtuner`` known to transformers and return it.

    It gets no function for masks: transformers then builds none, and does not look for boundaries
    of samples in the positions either, for which a GPU would have to be waited for at every step.
    """
    AttentionInterface.register(NAME, packed_attention)
    return NAME
