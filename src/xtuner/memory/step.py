"""The peak memory of a training step, measured on tensors without values. The step is a real one:
`PackedCausalLM` computes the log-probabilities of a batch, their sum is the loss, and a backward
pass follows. Weights and activations have shapes and dtypes only; their allocations and
deallocations are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from xtuner.kernels.attention import block_layout, blocks
from xtuner.kernels.compiled import shapes_only
from xtuner.kernels.fused.attention import rotation_of
from xtuner.kernels.scratch import buffers
from xtuner.memory.live_bytes import LiveBytes, pretend_cpu
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.filling import filled
from xtuner.parallel.ulysses import heads_to_tokens, tokens_to_heads
from xtuner.types import Batch

KEPT_BY_FLASH = "xtuner_footprint"
"""Name of an attention function that saves the same tensors as flash attention on a GPU."""


def peaks_of_step(
    model: PackedCausalLM,
    tokens: tuple[int, ...],
    few: tuple[int, int] | None = None,
    *,
    on_gpu: bool,
    accumulate: bool,
) -> list[float]:
    """Peaks of the forward pass and of both halves of the backward pass, in bytes. Each of the
    three grows linearly with the number of layers; which one is highest may change.

    Args:
        model: A model on the meta device; its tensors are replaced by others without values.
        tokens: Lengths of the samples in one micro-batch.
        few: Two lengths from which longer rows are extrapolated linearly.
        on_gpu: Count what a GPU would keep.
        accumulate: Gradients of an earlier micro-batch exist; they are not counted.
    """
    rows: list[tuple[int, ...]] = [(n,) for n in tokens] if model.apart else [tokens]
    options = {"on_gpu": on_gpu, "accumulate": accumulate}
    if few is None or sum(tokens) <= few[1]:
        return [*_peaks(model, rows, **options)]
    parts = [_peaks(model, [(n,)], **options) for n in few]
    return [line(few, pair, at=sum(tokens)) for pair in zip(*parts, strict=True)]


def line(xs: tuple[int, int], ys: tuple[float, float], *, at: int) -> float:
    """The value at `at` on the line through two points."""
    return ys[0] + (ys[1] - ys[0]) * (at - xs[0]) / (xs[1] - xs[0])


def _peaks(
    model: PackedCausalLM, rows: list[tuple[int, ...]], *, on_gpu: bool, accumulate: bool
) -> list[int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    batches = [_batch(row, fill=not model.apart) for row in rows]
    kernels = nullcontext() if on_gpu else shapes_only()
    with kernels, _separate_caches(), FakeTensorMode(allow_non_fake_inputs=True):
        pretend_cpu(model)
        for parameter in model.parameters():
            given = accumulate and parameter.requires_grad
            parameter.grad = torch.empty_like(parameter) if given else None
        counter = LiveBytes()
        with counter:
            loss = -torch.cat([model(batch) for batch in batches]).sum()
            if on_gpu:  # it is kept only on a CPU
                buffers.tensors.clear()
        forward = len(counter.history)
        with counter:
            loss.backward()
        history = counter.history
    middle = (forward + len(history)) // 2
    return [max(history[:forward]), max(history[forward:middle]), max(history[middle:])]


def _batch(tokens: tuple[int, ...], *, fill: bool) -> Batch:
    """A batch of fully supervised samples of these lengths. It has real values: attention reads the
    sequence boundaries, and the number of supervised positions depends on values.
    """
    ids = torch.zeros(1, sum(tokens), dtype=torch.int64)
    batch = Batch(
        input_ids=ids,
        labels=ids.clone(),
        position_ids=torch.cat([torch.arange(n) for n in tokens])[None],
        cu_seqlens=torch.tensor([0, *itertools.accumulate(tokens)], dtype=torch.int32),
    )
    batch = filled(batch) if fill else batch
    return replace(batch, found=(batch.labels, batch.predicting))


class _FlashFootprint(torch.autograd.Function):
    """Saves what flash attention saves: its inputs, its output, and one float32 per token and
    head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_footprint(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    group, heads = kwargs.get("sequence_group"), q.shape[1]
    if group is not None:
        q, k, v = tokens_to_heads(q, k, v, group)
    out: Tensor = _FlashFootprint.apply(q, k, v)  # type: ignore[no-untyped-call]
    return (out if group is None else heads_to_tokens(out, heads, group))[None], None


AttentionInterface.register(KEPT_BY_FLASH, _flash_footprint)


@contextmanager
def _separate_caches() -> Iterator[None]:
    """Keep tensors without values out of caches that a real step reads."""
    caches = (block_layout.layout_of, block_layout.shared_blocks, blocks._offsets, rotation_of)
    kept_before = dict(buffers.tensors)

    def clear() -> None:
        for cache in caches:
            cache.cache_clear()
        buffers.tensors.clear()

    clear()
    try:
        yield
    finally:
        clear()
        buffers.tensors.update(kept_before)
