"""Flash and memory-efficient attention of the fake CUDA device.

The signatures are those of the CUDA functions; the results are computed by the formula in float32
on the CPU, so neither rounding nor memory use are those of the real kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """Mask, scale and dropout of an attention call.

    Attributes:
        scale: Factor of the scores.
        left: Number of keys before its own that a query attends to, -1 for all; the last query is
            aligned with the last key.
        right: Number of keys after its own.
        dropout: Probability that a weight is dropped.
        seed: Determines which weights are dropped.
    """

    scale: float
    left: int = -1
    right: int = -1
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(
        cls,
        query: Tensor,
        causal: bool,
        scale: float | None,
        left: int | None = None,
        right: int | None = None,
        *drops: Any,
    ) -> Rules:
        """From the arguments of the CUDA functions."""
        right = 0 if causal else -1 if right is None else right
        return cls(scale or query.shape[-1] ** -0.5, -1 if left is None else left, right, *drops)

    def drops(self) -> Callable[[Tensor], Tensor]:
        """A function that applies dropout to weights, the same in forward and backward."""
        if not self.dropout:
            return lambda weights: weights
        generator = torch.Generator().manual_seed(self.seed)

        def drop(weights: Tensor) -> Tensor:
            kept = torch.rand(weights.shape, generator=generator) >= self.dropout
            return weights * kept / (1 - self.dropout)

        return drop

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores ``[heads, queries, keys]`` of one sample, -inf where masked."""
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if self.left >= 0:
            hidden |= -ahead > self.left
        if self.right >= 0:
            hidden |= ahead > self.right
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        return scores.masked_fill(hidden, -torch.inf)


Samples = list[tuple[slice, slice]]
"""The slices of queries and of keys of each sample."""


def _attend(qkv: list[Tensor], samples: Samples, rules: Rules) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v within each sample, ``[queries, heads, width]``, and the log-sum-exp
    of each row, ``[heads, queries]``."""
    q, k, v = qkv
    group, out = q.shape[1] // k.shape[1], q.new_empty(*q.shape[:2], v.shape[2])
    logs, drop = torch.empty(q.shape[1], q.shape[0]), rules.drops()
    for rows, keys in samples:
        scores = rules.scores(q[rows], k[keys].repeat_interleave(group, 1))
        values = v[keys].repeat_interleave(group, 1)
        out[rows] = torch.einsum("hqk,khd->qhd", drop(scores.softmax(-1)), values)
        logs[:, rows] = scores.logsumexp(-1)
    return out, logs


def _attend_backward(
    tensors: list[Tensor], logs: Tensor, samples: Samples, rules: Rules
) -> list[Tensor]:
    """Gradients of q, k and v; `tensors` are grad_output, q, k, v and the output."""
    grad, q, k, v, out = tensors
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    drop = rules.drops()
    for rows, keys in samples:
        ks, vs = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        weights = (rules.scores(q[rows], ks) - logs[:, rows, None]).exp()
        inner = (grad[rows] * out[rows]).sum(-1).T[:, :, None]
        kept = drop(torch.ones_like(weights))
        grad_weights = torch.einsum("qhd,khd->hqk", grad[rows], vs) * kept
        grad_scores = weights * (grad_weights - inner) * rules.scale
        dq[rows] = torch.einsum("hqk,khd->qhd", grad_scores, ks)
        for of, to, by in ((grad_scores, dk, q), (weights * kept, dv, grad)):
            to[keys] = torch.einsum("hqk,qhd->khd", of, by[rows]).unflatten(1, (-1, group)).sum(2)
    return [dq, dk, dv]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """Check what flash attention requires (16 bits, head sizes that are multiples of 8, contiguous
    heads) and return the tensors on the CPU in float32."""
    for x in tensors:
        supported = x.element_size() == 2 and x.shape[-1] % 8 == 0 and x.shape[-1] <= 256
        if not supported or x.stride(-1) != 1 or not x.is_cuda:
            raise RuntimeError(
                f"flash attention got {x.dtype} {x.shape} {x.stride()} on {x.device}"
            )
    return [x.cpu().float() for x in tensors]


def _slices(cum: Tensor, longest: int) -> list[slice]:
    parts = [slice(a, b) for a, b in itertools.pairwise(cum.tolist())]
    if (
        cum.dtype != torch.int32
        or not cum.is_cuda
        or max(p.stop - p.start for p in parts) > longest
    ):
        raise RuntimeError(
            f"flash attention got cu_seqlens {cum} and a longest sample of {longest}"
        )
    return parts


def _samples(cum_q: Tensor, cum_k: Tensor, most_q: int, most_k: int) -> Samples:
    return list(zip(_slices(cum_q, most_q), _slices(cum_k, most_k), strict=True))


def _seed(dropout: float) -> int:
    """Draw a seed, but only if there is dropout."""
    return int(torch.randint(2**31, ())) if dropout else 0


def _state(like: Tensor, seed: int = 0) -> Tensor:
    """The random state of dropout as the CUDA functions return it."""
    return torch.tensor([seed, 0], dtype=torch.uint64).to(like.device)


def _refuse(**arguments: Any) -> None:
    if any(arguments.values()):
        raise RuntimeError(f"not supported by the fake CUDA device: {arguments}")


def _packed(
    query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, most_q: int,
    most_k: int, dropout: float, causal: bool, debug: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(debug=debug, **rest)
    drops = dropout, _seed(dropout)
    rules = Rules.of(query, causal, scale, window_size_left, window_size_right, *drops)
    samples = _samples(cum_q, cum_k, most_q, most_k)
    out, logs = _attend(_wide(query, key, value), samples, rules)
    found = out.to(query.dtype).to(query.device), logs.to(query.device)
    return (*found, _state(query, rules.seed), _state(query), _state(query))


def _packed_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor,
    cum_q: Tensor, cum_k: Tensor, most_q: int, most_k: int, dropout: float, causal: bool,
    state: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    drops = dropout, int(state.cpu()[0])
    rules = Rules.of(query, causal, scale, window_size_left, window_size_right, *drops)
    samples = _samples(cum_q, cum_k, most_q, most_k)
    wide = _wide(grad, query, key, value, out)
    found = _attend_backward(wide, logs.cpu(), samples, rules)
    return tuple(x.to(query.dtype).to(query.device) for x in found)


def _rows(x: Tensor) -> Tensor:
    """Concatenate the samples of ``[batch, heads, length, width]``."""
    return x.transpose(1, 2).flatten(0, 1)


def _batch(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_rows`."""
    rows: Tensor = x.unflatten(0, (like.shape[0], -1))  # type: ignore[no-untyped-call]
    return rows.transpose(1, 2).to(like.dtype).to(like.device)


def _all_of(query: Tensor, key: Tensor, causal: bool) -> Samples:
    count, (m, n) = query.shape[0], (query.shape[2], key.shape[2])
    _refuse(causal_with_unequal_lengths=causal and m != n)
    return [(slice(i * m, i * m + m), slice(i * n, i * n + n)) for i in range(count)]


def _dense(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(dropout=dropout, debug=debug)
    rules, samples = Rules.of(query, causal, scale), _all_of(query, key, causal)
    out, logs = _attend([_rows(x) for x in _wide(query, key, value)], samples, rules)
    logs = logs.unflatten(1, (query.shape[0], -1)).transpose(0, 1).contiguous()
    nothing, lengths = _state(query), (query.shape[2], key.shape[2])
    ends = (None, None, *lengths)
    return (_batch(out, query), logs.to(query.device), *ends, nothing, nothing, nothing)


def _dense_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor,
    cum_q: Any, cum_k: Any, most_q: int, most_k: int, dropout: float, causal: bool,
    state: Tensor, unused: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rules, samples = Rules.of(query, causal, scale), _all_of(query, key, causal)
    sums = logs.cpu().transpose(0, 1).flatten(1)
    wide = [_rows(x) for x in _wide(grad, query, key, value, out)]
    found = _attend_backward(wide, sums, samples, rules)
    return tuple(_batch(x, of) for x, of in zip(found, (query, key, value), strict=True))


CAUSAL = 1
"""The mask type of memory-efficient attention that is supported here."""
ROUNDED = 32
"""Memory-efficient attention pads the log-sum-exp to a multiple of it."""


def _plain(*tensors: Tensor) -> list[Tensor]:
    """Check what memory-efficient attention requires (head sizes that are multiples of 16 bytes, as
    many key as query heads) and return ``[N, heads, width]`` on the CPU in float32."""
    heads = {x.shape[2] for x in tensors}
    for x in tensors:
        aligned = x.shape[-1] * x.element_size() % 16 == 0 and x.stride(-1) == 1
        if not aligned or x.shape[0] != 1 or not x.is_cuda or len(heads) != 1:
            raise RuntimeError(
                f"memory-efficient attention got {x.dtype} {x.shape} {x.stride()} on {x.device}"
            )
        if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
            raise RuntimeError("Expected query to have dtype half or float on this GPU")
    return [x[0].cpu().float() for x in tensors]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, cum_q: Tensor, cum_k: Tensor,
    most_q: int, most_k: int, dropout: float, mask: int, sums: bool = False, *,
    scale: float | None = None, seqlen_k: Any = None, window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(bias=bias is not None, mask=mask != CAUSAL, seqlen_k=seqlen_k is not None)
    left = None if window_size is None else window_size - 1
    rules = Rules.of(query, True, scale, left, None, dropout, _seed(dropout))
    samples = _samples(cum_q, cum_k, most_q, most_k)
    out, logs = _attend(_plain(query, key, value), samples, rules)
    longest = -(-most_q // ROUNDED) * ROUNDED
    kept = torch.full((len(samples), query.shape[2], longest if sums else 0), torch.inf)
    for i, (part, _) in enumerate(samples if sums else ()):
        kept[i, :, : part.stop - part.start] = logs[:, part]
    state = [torch.tensor(x).to(query.device) for x in (rules.seed, 0)]
    out = out[None].to(query.dtype).to(query.device)
    return out, kept.to(query.device), *state, most_q, most_k


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, out: Tensor, cum_q: Tensor,
    cum_k: Tensor, most_q: int, most_k: int, logs: Tensor, dropout: float, seed: Tensor,
    offset: Tensor, mask: int, bias_requires_grad: bool, *, scale: float | None = None,
    num_splits_key: Any = None, window_size: int | None = None, shared_storage_dqdkdv: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(mask=mask != CAUSAL, splits=num_splits_key, shared=shared_storage_dqdkdv)
    left = None if window_size is None else window_size - 1
    rules = Rules.of(query, True, scale, left, None, dropout, int(seed.cpu()))
    samples = _samples(cum_q, cum_k, most_q, most_k)
    kept = [x[:, : a.stop - a.start] for x, (a, _) in zip(logs.cpu(), samples, strict=True)]
    found = _attend_backward(
        _plain(grad.contiguous(), query, key, value, out), torch.cat(kept, 1), samples, rules
    )
    return (*(x[None].to(query.dtype).to(query.device) for x in found), None)


def _too_old(*_: Any, **__: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")


FLASH: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _packed,
    "_flash_attention_backward": _packed_backward,
    "_scaled_dot_product_flash_attention": _dense,
    "_scaled_dot_product_flash_attention_backward": _dense_backward,
}
"""By the names of torch's operations; the first two take cu_seqlens."""
EFFICIENT: dict[str, Callable[..., Any]] = {
    "_efficient_attention_forward": _efficient,
    "_efficient_attention_backward": _efficient_backward,
}


def functions(capability: tuple[int, int]) -> dict[str, Callable[..., Any]]:
    """The operations of a device of this compute capability; unsupported ones raise."""
    flash = FLASH if capability >= (8, 0) else dict.fromkeys(FLASH, _too_old)
    return {**flash, **EFFICIENT}
