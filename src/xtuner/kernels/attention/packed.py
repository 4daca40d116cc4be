"""Attention of packed rows, in which samples do not attend to each other.

Registered in transformers' attention interface as ``xtuner``. It takes `cu_seq_lens_q` instead of a
mask, so no work is spent on pairs of tokens of different samples (four fifths of a packed row of
1,024 tokens at 200 tokens per sample). A call without `cu_seq_lens_q` is an error, never a leaking
mask. Kernels:

- GPU: varlen flash attention, or memory-efficient attention for float32 and for GPUs without
  bfloat16 (`varlen`);
- CPU: `cpu_attention`;
- otherwise, and on a CPU with dropout or softcap: one call per sample.
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
from xtuner.parallel.ulysses import SequenceGroup, heads_to_tokens, tokens_to_heads

NAME = "xtuner"
SDPA_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def without_cudnn(device: torch.device) -> AbstractContextManager[None]:
    """Disable the cuDNN backend of SDPA, which builds a new plan for each new length.

    A plan takes 160 ms on a Hopper GPU, where cuDNN has the highest priority, and packed samples,
    validation and prompts keep bringing new lengths. Backends disabled by the caller stay disabled.
    """
    if device.type != "cuda":
        return nullcontext()
    if not torch.compiler.is_compiling() and not torch.backends.cuda.cudnn_sdp_enabled():
        return nullcontext()  # nested: entering again would cost 12 us of host time
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
        value: As `key`.
        scaling: Factor of the scores.
        dropout: Probability that an attention weight is set to zero.
        window: A token attends to itself and the ``window - 1`` tokens before it.
        softcap: Scores become ``softcap * tanh(scores / softcap)``.

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


class CallRecorder:
    """Context manager that records the options with which layers call `packed_attention`."""

    active: CallRecorder | None = None

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __enter__(self) -> CallRecorder:
        CallRecorder.active = self
        return self

    def __exit__(self, *_: object) -> None:
        CallRecorder.active = None


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
    """Attention function for transformers: `query` ``[1, heads, N, head_dim]`` to ``[1, N, heads,
    head_dim]``.

    With `sequence_group` N are this process's tokens of a row that the group shares, and
    `cu_seq_lens_q` are those of the row.

    Raises:
        ModelError: `cu_seq_lens_q` is missing, or the layer uses an unsupported option.
    """
    if CallRecorder.active is not None:
        CallRecorder.active.calls.append({**kwargs, "scaling": scaling, "dropout": dropout})
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if cu_seqlens is None or attention_mask is not None or query.shape[0] != 1:
        raise ModelError(
            "xtuner's attention needs one packed row and its cu_seqlens, which this model does not "
            "pass on"
        )
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or not getattr(module, "is_causal", True):
        raise ModelError(
            f"the attention of this model ({type(module).__name__}) "
            f"{'uses ' + ', '.join(unknown) if unknown else 'is not causal'}, which xtuner's "
            "attention does not support"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, heads, head_dim]
    group: SequenceGroup | None = kwargs.get("sequence_group")
    heads = q.shape[1]
    if group is not None:
        q, k, v = tokens_to_heads(q, k, v, group)
    tokens = cu_seqlens.tolist()[-1]  # indexing would give a tensor without a value in a forecast
    if q.shape[0] != tokens:
        raise ModelError(
            f"{type(module).__name__} passes {q.shape[0]} tokens of a row of {tokens} to its "
            "attention, without `sequence_group`: set sequence_parallel_size = 1"
        )
    options = {"scale": scaling, "dropout": dropout, "window": window, "softcap": softcap}
    out = _of_row(q, k, v, cu_seqlens, longest=kwargs.get("max_length_q"), **options)
    return (out if group is None else heads_to_tokens(out, heads, group))[None], None


def _of_row(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, longest: int | None, **options: Any
) -> Tensor:
    """Attention of a row, ``[N, heads, D]`` to ``[N, heads, V]``, by the fastest available
    kernel."""
    call = call_of(q, k, v, **options)
    if q.device.type == "cpu":
        if not call.dropout and call.softcap is None:
            ends = tuple(cu_seqlens.tolist())
            return cpu_attention(q, k, v, ends, scale=call.scale, window=call.window)
    else:
        out = varlen.attend(q, k, v, call, cu_seqlens=cu_seqlens, longest=longest)
        if out is not None:
            return out
        _warn_once(varlen.choose(call).why)
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _by_sample(query, key, value, cu_seqlens.tolist(), call)[0]


def _by_sample(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], call: AttentionCall
) -> Tensor:
    """``[1, N, heads, head_dim]`` by one call of `sample_attention` per sample."""
    with without_cudnn(query.device):
        outputs = [
            sample_attention(
                *(x[:, :, start:end] for x in (query, key, value)),
                scaling=call.scale,
                dropout=call.dropout,
                window=call.window,
                softcap=call.softcap,
            )
            for start, end in itertools.pairwise(ends)
        ]
    outputs = [out.transpose(1, 2) for out in outputs]
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def call_of(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> AttentionCall:
    """The `AttentionCall` for queries ``[N, heads, D]``, keys and values ``[N, kv_heads, D]``."""
    return AttentionCall(
        query.device,
        query.dtype,
        *(query.shape[1], key.shape[1], query.shape[2], value.shape[2]),
        **options,
    )


reported: set[str] = set()
"""Reasons for per-sample attention that were already printed or warned about."""


def _warn_once(why: str) -> None:
    if why not in reported:
        reported.add(why)
        warnings.warn(
            "attention runs one sample at a time, which is slower and takes more memory: " + why,
            stacklevel=2,
        )


def register() -> str:
    """Register ``xtuner`` in transformers' attention interface and return the name.

    No mask function is registered: transformers then builds no mask and does not search the
    position ids for sample boundaries, which would synchronize with the GPU at every step.
    """
    AttentionInterface.register(NAME, packed_attention)
    return NAME
