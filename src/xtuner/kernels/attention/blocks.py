"""Block-wise causal attention of packed samples on a CPU, with few large products.

The row is cut into blocks of `BLOCK` queries. A block attends to the keys from the first token of
its first sample (or from the start of its sliding window) to its own end, so little work is spent
on masked pairs. Blocks with the same number of keys are multiplied together, which gives few shapes
for any sample lengths (oneDNN compiles code for each new shape). The backward pass is explicit:

    P = softmax(s Q K^T),  O = P V
    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(dP * P)),  dQ = s dS K,  dK = s dS^T Q

torch's CPU kernel takes two to three times as long, mostly in its backward pass.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xtuner.kernels import compiled
from xtuner.kernels.attention.block_layout import (
    BLOCK,
    Blocks,
    Layout,
    blocks_of,
    layout_of,
)
from xtuner.kernels.compiled import Kernels, Rotation, kernels_for, readable


class _BlockAttention(torch.autograd.Function):
    """``[N, heads, D]``, ``[N, kv_heads, D]``, ``[N, kv_heads, V]`` to ``[N, heads, V]``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation | None,
        layout: Layout,
        scale: float,
    ) -> Tensor:
        heads, kv_heads = query.shape[1], key.shape[1]
        kernels = kernels_for_rows(query, key, value) if layout.widest <= 2**16 else None
        q = _in_blocks(query, layout, rotation, kernels).view(
            -1, kv_heads, BLOCK * heads // kv_heads, query.shape[2]
        )
        k = _by_head(key, layout, rotation, kernels)
        v = _by_head(value, layout, None, kernels)
        out = q.new_empty(*q.shape[:-1], value.shape[-1])
        saved = []
        for blocks in blocks_of(layout, heads, kv_heads, query.device):
            weights = _weights(q, k, blocks, scale, kernels)
            torch.matmul(weights, _gather(v, blocks), out=out[blocks.part])
            if blocks.saves_weights and any(ctx.needs_input_grad):
                saved.append(weights)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.options = query.shape[0], heads, rotation, layout, scale, kernels
        return _from_blocks(
            out.view(-1, heads, BLOCK, value.shape[-1]), query.shape[0], layout, None, kernels
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, *saved = ctx.saved_tensors
        total, heads, rotation, layout, scale, kernels = ctx.options
        wide = torch.promote_types(q.dtype, torch.float32)
        grad = _in_blocks(grad, layout, None, kernels).view(*q.shape[:-1], grad.shape[-1])
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        saved_weights = iter(saved)
        for blocks in blocks_of(layout, heads, k.shape[0], q.device):
            part = blocks.part
            if blocks.saves_weights:
                weights = next(saved_weights)
            else:
                weights = _weights(q, k, blocks, scale, kernels)
            grad_weights = grad[part] @ _gather(v, blocks).mT
            _scatter_add(grad_v, blocks, weights.mT @ grad[part], kernels)
            scores = _grad_scores(grad_weights, weights, blocks, scale, kernels)
            torch.matmul(scores, _gather(k, blocks), out=grad_q[part])
            _scatter_add(grad_k, blocks, scores.mT @ q[part], kernels)
        grad_query = _from_blocks(
            grad_q.view(-1, heads, BLOCK, q.shape[-1]), total, layout, rotation, kernels
        )
        grad_key = _from_heads(grad_k.to(k.dtype), total, rotation, kernels)
        grad_value = _from_heads(grad_v.to(v.dtype), total, None, kernels)
        return grad_query, grad_key, grad_value, None, None, None


def kernels_for_rows(*tensors: Tensor) -> Kernels | None:
    """The kernels for tensors of any strides; None if their dtypes differ."""
    return kernels_for(*(x.new_empty(0) for x in tensors))


def _weights(q: Tensor, k: Tensor, blocks: Blocks, scale: float, kernels: Kernels | None) -> Tensor:
    """Attention weights ``[n, kv_heads, group * b, w]``; the softmax sums in float32."""
    scores = q[blocks.part] @ _gather(k, blocks).mT
    if kernels is not None:
        return kernels.softmax_within(scores, blocks.within, scale)
    by_query = scores.view(len(scores), -1, BLOCK, blocks.width)
    torch.add(blocks.bias.to(scores.dtype), by_query, alpha=scale, out=by_query)
    return torch.softmax(scores, -1)


def _grad_scores(
    grad: Tensor, weights: Tensor, blocks: Blocks, scale: float, kernels: Kernels | None
) -> Tensor:
    if kernels is not None:
        return kernels.softmax_within_backward(grad, weights, blocks.within, scale)
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


def _in_blocks(
    x: Tensor, layout: Layout, rotation: Rotation | None, kernels: Kernels | None
) -> Tensor:
    """Rotate ``[N, heads, D]`` and arrange it as ``[blocks, heads, b, D]`` in layout order."""
    total, heads, width = x.shape
    if kernels is not None:
        make = x.new_empty if total == layout.total else x.new_zeros
        out = make(len(layout.order), heads, BLOCK, width)
        return kernels.rotate_out(
            readable(x), rotation, out, _offsets(layout, heads, width), BLOCK * width
        )
    x = F.pad(_rotated(x, rotation), (0, 0, 0, 0, 0, layout.total - total))
    x = x.reshape(layout.total // BLOCK, -1).index_select(0, layout.order)
    return x.view(len(x), BLOCK, heads, width).transpose(1, 2).contiguous()


def _from_blocks(
    x: Tensor, total: int, layout: Layout, rotation: Rotation | None, kernels: Kernels | None
) -> Tensor:
    """Inverse of `_in_blocks`; with a rotation, its backward pass."""
    num_blocks, heads, _, width = x.shape
    if kernels is not None:
        out = x.new_empty(total, heads, width)
        offsets = _offsets(layout, heads, width)
        return kernels.rotate_back(x, rotation, out, offsets, BLOCK * width)
    x = x.view(num_blocks, -1).index_select(0, layout.order.argsort())
    x = x.view(num_blocks, heads, BLOCK, width).transpose(1, 2)
    return _rotated_back(x.reshape(layout.total, heads, width)[:total], rotation)


def _by_head(
    x: Tensor, layout: Layout, rotation: Rotation | None, kernels: Kernels | None
) -> Tensor:
    """Rotate ``[N, kv_heads, D]`` and arrange it as ``[kv_heads, padded N, D]``."""
    total, heads, width = x.shape
    make = x.new_empty if total == layout.total else x.new_zeros
    out = make(heads, layout.total, width)
    if kernels is not None:
        offsets = torch.arange(0, total * width, width)
        return kernels.rotate_out(readable(x), rotation, out, offsets, layout.total * width)
    out[:, :total] = _rotated(x, rotation).transpose(0, 1)
    return out


def _from_heads(
    x: Tensor, total: int, rotation: Rotation | None, kernels: Kernels | None
) -> Tensor:
    """Backward pass of `_by_head`."""
    heads, padded, width = x.shape
    if kernels is not None:
        offsets = torch.arange(0, total * width, width)
        out = x.new_empty(total, heads, width)
        return kernels.rotate_back(x, rotation, out, offsets, padded * width)
    return _rotated_back(x.transpose(0, 1)[:total], rotation)


@lru_cache(maxsize=8)
def _offsets(layout: Layout, heads: int, width: int) -> Tensor:
    """Offset of the first head of each token in the result of `_in_blocks`."""
    token = torch.arange(layout.total)
    block = layout.order.argsort()[token // BLOCK]
    return (block * (heads * BLOCK) + token % BLOCK) * width


def _rotated(x: Tensor, rotation: Rotation | None) -> Tensor:
    if rotation is None:
        return x
    cos, sin = (angle[:, None] for angle in rotation)
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def _rotated_back(grad: Tensor, rotation: Rotation | None) -> Tensor:
    if rotation is None:
        return grad
    cos, sin = (angle[:, None] for angle in rotation)
    a, b = (grad * sin).chunk(2, -1)
    return (grad * cos + torch.cat([b, -a], -1)).to(grad.dtype)


def _gather(x: Tensor, blocks: Blocks) -> Tensor:
    """Keys or values of the blocks, ``[n, kv_heads, w, D]``."""
    kv_heads, _, width = x.shape
    return x.flatten(0, 1).index_select(0, blocks.rows).view(-1, kv_heads, blocks.width, width)


def _scatter_add(target: Tensor, blocks: Blocks, x: Tensor, kernels: Kernels | None) -> None:
    """Add ``[n, kv_heads, w, D]`` to the blocks' keys in ``[kv_heads, N, D]``, which overlap."""
    if kernels is not None:
        kernels.add_windows(x, target, blocks.starts_tensor, BLOCK)
        return
    for start, part in zip(blocks.starts, x, strict=True):
        target[:, start : start + blocks.width] += part


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row.

    Args:
        query: ``[N, heads, D]``.
        key: ``[N, kv_heads, D]``; query head h reads kv head ``h // (heads / kv_heads)``.
        value: ``[N, kv_heads, V]``.
        cu_seqlens: The start of each sample, then N.
        scale: Factor of the scores.
        window: A token attends to itself and the ``window - 1`` tokens before it in its sample.
        rotation: Rotary positions applied to queries and keys first.

    Returns:
        ``[N, heads, V]``.
    """
    layout = layout_of(cu_seqlens, window)
    out: Tensor = _BlockAttention.apply(query, key, value, rotation, layout, scale)  # type: ignore[no-untyped-call]
    return out


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: tuple[int, ...],
    *,
    scale: float,
    window: int | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Causal attention within each sample of a packed row: one compiled call if the CPU has
    bfloat16 products, otherwise `block_attention`, which takes the same arguments."""
    kernels = kernels_for_rows(query, key, value)
    same = query.shape[2] == key.shape[2] == value.shape[2]
    if kernels is not None and same and kernels.attends(query.shape[2]):
        rows = compiled.rows_of(cu_seqlens, window, scale)
        return compiled.attention(query, key, value, rotation, rows, kernels)
    return block_attention(
        query, key, value, cu_seqlens, scale=scale, window=window, rotation=rotation
    )
