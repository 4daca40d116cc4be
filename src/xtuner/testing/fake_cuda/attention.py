"""Flash attention on a GPU on paper: its formula, and what CUDA's function takes and gives.

Wide and on the CPU, so no numbers of the kernels and no memory beside their results.
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
    """Which keys a query sees: `left` and `right` many beside the one of its own place (-1: all),
    the last query standing beside the last key; and the factor of the scores."""

    scale: float
    left: int = -1
    right: int = -1

    @classmethod
    def of(
        cls, query: Tensor, causal: bool, scale: float | None, left: int | None, right: int | None
    ) -> Rules:
        """From arguments of CUDA's functions."""
        right = 0 if causal else -1 if right is None else right
        return cls(scale or query.shape[-1] ** -0.5, -1 if left is None else left, right)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """``[heads, queries, keys]`` of one sample, -inf where a key is not seen."""
        ahead = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if self.left >= 0:
            hidden |= -ahead > self.left
        if self.right >= 0:
            hidden |= ahead > self.right
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        return scores.masked_fill(hidden, -torch.inf)


Samples = list[tuple[slice, slice]]
"""Places of queries and of keys."""


def _attend(qkv: list[Tensor], samples: Samples, rules: Rules) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v within each sample ``[queries, heads, width]``, and the logs of the
    sums ``[heads, queries]``."""
    q, k, v = qkv
    group, out = q.shape[1] // k.shape[1], torch.empty_like(q)
    logs = torch.empty(q.shape[1], q.shape[0])
    for here, there in samples:
        scores = rules.scores(q[here], k[there].repeat_interleave(group, 1))
        values = v[there].repeat_interleave(group, 1)
        out[here] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        logs[:, here] = scores.logsumexp(-1)
    return out, logs


def _pull_back(tensors: list[Tensor], logs: Tensor, samples: Samples, rules: Rules) -> list[Tensor]:
    """Gradients of q, k and v, from those of the result, q, k, v and the result."""
    grad, q, k, v, out = tensors
    group = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for here, there in samples:
        ks, vs = (x[there].repeat_interleave(group, 1) for x in (k, v))
        weights = (rules.scores(q[here], ks) - logs[:, here, None]).exp()
        inner = (grad[here] * out[here]).sum(-1).T[:, :, None]
        slopes = weights * (torch.einsum("qhd,khd->hqk", grad[here], vs) - inner) * rules.scale
        dq[here] = torch.einsum("hqk,khd->qhd", slopes, ks)
        for of, to, by in ((slopes, dk, q), (weights, dv, grad)):
            to[there] = torch.einsum("hqk,qhd->khd", of, by[here]).unflatten(1, (-1, group)).sum(2)
    return [dq, dk, dv]


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the CPU; flash attention takes 16 bits, and rows without gaps."""
    for x in tensors:
        if x.element_size() != 2 or x.stride(-1) != 1 or not x.is_cuda:
            raise RuntimeError(f"flash attention got {x.dtype} {x.stride()} on {x.device}")
    return [x.cpu().float() for x in tensors]


def _borders(cum: Tensor, longest: int) -> list[slice]:
    parts = [slice(a, b) for a, b in itertools.pairwise(cum.tolist())]
    if (
        cum.dtype != torch.int32
        or not cum.is_cuda
        or max(p.stop - p.start for p in parts) > longest
    ):
        raise RuntimeError(f"flash attention got borders {cum} and a longest sample of {longest}")
    return parts


def _samples(cum_q: Tensor, cum_k: Tensor, most_q: int, most_k: int) -> Samples:
    return list(zip(_borders(cum_q, most_q), _borders(cum_k, most_k), strict=True))


def _nothing(like: Tensor) -> Tensor:
    """Where CUDA's functions keep the state of their dropout."""
    return torch.zeros(2, dtype=torch.uint64).to(like.device)


def _refuse(**arguments: Any) -> None:
    if any(arguments.values()):
        raise RuntimeError(f"not built for a GPU on paper: {arguments}")


def _packed(
    query: Tensor, key: Tensor, value: Tensor, cum_q: Tensor, cum_k: Tensor, most_q: int,
    most_k: int, dropout: float, causal: bool, debug: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **rest: Any,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(dropout=dropout, debug=debug, **rest)
    rules = Rules.of(query, causal, scale, window_size_left, window_size_right)
    samples = _samples(cum_q, cum_k, most_q, most_k)
    out, logs = _attend(_wide(query, key, value), samples, rules)
    nothing = _nothing(query)
    found = out.to(query.dtype).to(query.device), logs.to(query.device)
    return (*found, nothing, nothing, nothing)


def _packed_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor,
    cum_q: Tensor, cum_k: Tensor, most_q: int, most_k: int, dropout: float, causal: bool,
    state: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rules = Rules.of(query, causal, scale, window_size_left, window_size_right)
    samples = _samples(cum_q, cum_k, most_q, most_k)
    wide = _wide(grad, query, key, value, out)
    found = _pull_back(wide, logs.cpu(), samples, rules)
    return tuple(x.to(query.dtype).to(query.device) for x in found)


def _rows(x: Tensor) -> Tensor:
    """``[batch, heads, length, width]`` as samples one behind the other."""
    return x.transpose(1, 2).flatten(0, 1)


def _batch(x: Tensor, like: Tensor) -> Tensor:
    """And back."""
    rows: Tensor = x.unflatten(0, (like.shape[0], -1))  # type: ignore[no-untyped-call]
    return rows.transpose(1, 2).to(like.dtype).to(like.device)


def _all_of(query: Tensor, key: Tensor, causal: bool) -> Samples:
    count, (m, n) = query.shape[0], (query.shape[2], key.shape[2])
    _refuse(causal_with_unequal_lengths=causal and m != n)
    return [(slice(i * m, i * m + m), slice(i * n, i * n + n)) for i in range(count)]


def _whole(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse(dropout=dropout, debug=debug)
    rules, samples = Rules.of(query, causal, scale, None, None), _all_of(query, key, causal)
    out, logs = _attend([_rows(x) for x in _wide(query, key, value)], samples, rules)
    logs = logs.unflatten(1, (query.shape[0], -1)).transpose(0, 1).contiguous()
    nothing, lengths = _nothing(query), (query.shape[2], key.shape[2])
    ends = (None, None, *lengths)
    return (_batch(out, query), logs.to(query.device), *ends, nothing, nothing, nothing)


def _whole_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logs: Tensor,
    cum_q: Any, cum_k: Any, most_q: int, most_k: int, dropout: float, causal: bool,
    state: Tensor, unused: Tensor, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rules, samples = Rules.of(query, causal, scale, None, None), _all_of(query, key, causal)
    sums = logs.cpu().transpose(0, 1).flatten(1)
    wide = [_rows(x) for x in _wide(grad, query, key, value, out)]
    found = _pull_back(wide, sums, samples, rules)
    return tuple(_batch(x, of) for x, of in zip(found, (query, key, value), strict=True))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": _packed,
    "_flash_attention_backward": _packed_backward,
    "_scaled_dot_product_flash_attention": _whole,
    "_scaled_dot_product_flash_attention_backward": _whole_backward,
}
"""By the names of torch's operations; the first two take samples by their borders."""
