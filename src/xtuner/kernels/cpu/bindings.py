"""ctypes bindings of the compiled CPU kernels.

Formulas are in ``kernels.c`` and the files it includes; `build` compiles them. Without them every
caller does the same with torch. The functions use torch's number of threads and support bfloat16
and float32; attention and linear layers support bfloat16 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xtuner.kernels.cpu.build import has_products, library
from xtuner.kernels.scratch import scratch_buffer

TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
NUMBER, REAL, FLAG = ctypes.c_int64, ctypes.c_float, ctypes.c_int


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, float32 ``[N, D]``, of rotary positions (arXiv:2104.09864, equation 34)."""


class Packed(ctypes.Structure):
    """`Packed` of attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "cosine", "sine")),
        *((name, ctypes.POINTER(ctypes.c_int32)) for name in ("start", "length")),
        *((name, NUMBER) for name in ("samples", "tokens", "heads", "kv_heads", "width")),
        *((name, NUMBER) for name in ("q_row", "k_row", "v_row", "window")),
        ("scale", REAL),
    )


class Rows:
    """The attention pattern of a packed row.

    Args:
        cu_seqlens: The start of each sample, then the number of tokens.
        window: A token attends to itself and the ``window - 1`` tokens before it in its sample.
        scale: Factor of the scores.
    """

    def __init__(self, cu_seqlens: tuple[int, ...], window: int | None, scale: float):
        # longest first, so that threads finish at about the same time
        samples = sorted(
            ((end - start, start) for start, end in itertools.pairwise(cu_seqlens)), reverse=True
        )
        numbers = ctypes.c_int32 * len(samples)
        self.lengths = numbers(*(length for length, _ in samples))
        self.starts = numbers(*(start for _, start in samples))
        self.longest = samples[0][0]
        self.window, self.scale = window, scale


class Kernels:
    """The compiled functions for one dtype; tensors must be contiguous unless noted otherwise."""

    def __init__(self, library: ctypes.CDLL | None, suffix: str):
        self._library, self._suffix = library, suffix

    def call(self, name: str, *arguments: Any) -> None:
        """Call the C function `name` for this dtype, with torch's number of threads."""
        if self._library is None:  # meta tensors
            return
        function = getattr(self._library, f"{name}_{self._suffix}")
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        function(*values, FLAG(torch.get_num_threads()))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Normalize ``[..., H]``; also return the factor of each row in float32."""
        y, width = torch.empty_like(x), x.shape[-1]
        scale = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        rows = NUMBER(scale.numel())
        self.call("rms_norm", x, weight, y, scale, rows, NUMBER(width), REAL(eps))
        return y, scale

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, grad_weight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of `x` and, if `grad_weight`, of `weight`, in float32."""
        rows, width = scale.numel(), x.shape[-1]
        out, parts = torch.empty_like(x), None
        if grad_weight:
            parts = x.new_empty(-(-rows // 64), width, dtype=torch.float32)
        sizes = NUMBER(rows), NUMBER(width)
        self.call("rms_norm_backward", grad, x, weight, scale, None, out, parts, *sizes)
        return out, None if parts is None else parts.sum(0)

    def silu_product(self, gate: Tensor, up: Tensor) -> Tensor:
        """``silu(gate) * up``."""
        out = torch.empty_like(gate)
        self.call("silu_product", gate, up, out, NUMBER(gate.numel()))
        return out

    def silu_product_backward(
        self, grad: Tensor, gate: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of `gate` and `up`."""
        outs = torch.empty_like(gate), torch.empty_like(up)
        self.call("silu_product_backward", grad, gate, up, *outs, NUMBER(gate.numel()))
        return outs

    def softmax_within(self, scores: Tensor, within: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """Softmax of ``scale * scores`` over the keys that each query attends to, in place.

        Args:
            scores: ``[n, kv_heads, group * b, w]``.
            within: First key and last key + 1 of each query; int32 ``[n, b]``.
            scale: Factor of the scores.
        """
        self.call("softmax_within", scores, *within, *_score_sizes(scores, within), REAL(scale))
        return scores

    def softmax_within_backward(
        self, grad: Tensor, weights: Tensor, within: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Gradient of the scores; overwrites `grad`, the gradient of the weights."""
        sizes = _score_sizes(grad, within)
        self.call("softmax_within_backward", grad, weights, *within, *sizes, REAL(scale))
        return grad

    def rotate_out(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, out: Tensor, offsets: Tensor,
        head_stride: int,
    ) -> Tensor:  # fmt: skip
        """Write each head of `x`, rotated, to ``out``, at ``offsets[token] + head * head_stride``.

        Args:
            x: ``[N, heads, D]``, the last two dimensions contiguous.
            rotation: Cosines and sines, float32 ``[N, D]``, or None.
            out: The destination.
            offsets: int64 ``[N]``.
            head_stride: Elements from one head to the next.
        """
        cos, sin = rotation or (None, None)
        sizes = [NUMBER(n) for n in (*x.shape, x.stride(0), head_stride)]
        self.call("rotate_out", x, cos, sin, out, offsets, *sizes)
        return out

    def rotate_back(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, out: Tensor, offsets: Tensor,
        head_stride: int,
    ) -> Tensor:  # fmt: skip
        """Backward pass of `rotate_out`, from `x` into ``out [N, heads, D]``."""
        cos, sin = rotation or (None, None)
        sizes = [NUMBER(n) for n in (*out.shape, out.stride(0), head_stride)]
        self.call("rotate_back", x, cos, sin, out, offsets, *sizes)
        return out

    def add_windows(self, part: Tensor, total: Tensor, starts: Tensor, tile: int) -> None:
        """Add ``part [n, heads, w, D]`` to ``total [heads, N, D]`` (float32) at ``starts [n]``;
        starts and w are multiples of `tile`."""
        blocks, heads, keys, width = part.shape
        sizes = [NUMBER(n) for n in (blocks, heads, keys, total.shape[1], width, tile)]
        self.call("add_windows", part, total, starts, *sizes)

    def multiplies(self, inner: int) -> bool:
        """Whether `product` supports an `inner` dimension of this size."""
        return self._suffix == "bfloat16" and inner > 0 and inner % 2 == 0 and has_products()

    def attends(self, width: int) -> bool:
        """Whether `attention` supports heads of `width`."""
        return width % 32 == 0 and width <= 256 and self.multiplies(width)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Return the output ``[N, heads, D]`` and the log-sum-exp of each row, ``[heads, N]``.

        Args:
            q: ``[N, heads, D]``; the token stride is free, also of `k` and `v`.
            k: ``[N, kv_heads, D]``.
            v: ``[N, kv_heads, D]``.
            rotation: Cosines and sines, float32 ``[N, D]``, or None.
            rows: The attention pattern.
        """
        out, logs = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        scratch = self.scratch("attention_scratch_bytes", *_sizes(q, rows), FLAG(False))
        self.call("attention", _heads(q, k, v, rotation, rows), out, logs, scratch)
        return out, logs

    def attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None,
        rows: Rows, out: Tensor, logs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of `q`, `k` and `v`; `grad` and `out` are contiguous."""
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        parts = q.new_empty(2, q.shape[1], q.shape[0], q.shape[2], dtype=torch.float32)
        heads = _heads(q, k, v, rotation, rows)
        scratch = self.scratch("attention_scratch_bytes", *_sizes(q, rows), FLAG(True))
        self.call("attention_backward", heads, out, logs, grad, *grads, parts, scratch)
        return grads

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, across: bool = False) -> Tensor:
        """``a [M, K]`` times ``b [K, N]``, or ``b [N, K]`` if `across`, into ``out [M, N]``; K is
        even."""
        columns = out.shape[1]
        sizes = [NUMBER(n) for n in (len(a), columns, a.shape[1])]
        scratch = self.scratch("product_scratch_bytes", *sizes)
        self.call("product", a, b, out, *sizes, FLAG(across), scratch)
        return out

    def scratch(self, name: str, *arguments: Any) -> Tensor:
        """Scratch memory of a call for all threads; the C function `name` returns its size."""
        size = self.measure(name, *arguments, FLAG(torch.get_num_threads()))
        return scratch_buffer("compiled functions", size, torch.uint8, torch.device("cpu"))

    def measure(self, name: str, *arguments: Any) -> int:
        """The size in bytes that the C function `name` returns."""
        function: Any = getattr(library()[0], f"{name}_{self._suffix}")
        function.restype = NUMBER
        return int(function(*arguments))

    def quantize_4bit(self, x: Tensor, bounds: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Pack `x` as 4-bit values and return them with the scale of each block, in float32.

        Args:
            x: Any shape; its size is a multiple of `block`.
            bounds: The 15 bounds between the values of the code, rising, in float32.
            block: Values that share a scale; even, at most 4,096.
        """
        packed = torch.empty(x.numel() // 2, 1, dtype=torch.uint8)
        scales = torch.empty(x.numel() // block, dtype=torch.float32)
        self.call("quantize_4bit", x, bounds, scales, packed, NUMBER(len(scales)), NUMBER(block))
        return packed, scales

    def cross_entropy(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Loss of each row in float32; with `gradient`, logits are overwritten by their gradient.

        Raises:
            IndexError: A target is outside the vocabulary.
        """
        rows, vocabulary = logits.shape
        if self._library is not None and rows:
            least, most = (int(x) for x in torch.aminmax(targets))
            if least < 0 or most >= vocabulary:
                wrong = least if least < 0 else most
                raise IndexError(f"target {wrong} is out of range for a vocabulary of {vocabulary}")
        loss = logits.new_empty(rows, dtype=torch.float32)
        sizes = NUMBER(rows), NUMBER(vocabulary), FLAG(gradient)
        self.call("cross_entropy", logits, targets, loss, *sizes)
        return loss


def packed(rows: Rows, rotation: tuple[Tensor, Tensor] | None, *sizes: int) -> Packed:
    """The C structure for `rows`; `sizes` are tokens, heads, key heads and head size."""
    angles = [address(tensor) for tensor in rotation or (None, None)]
    return Packed(
        *(None, None, None, *angles, rows.starts, rows.lengths, len(rows.starts), *sizes),
        *(0, 0, 0, rows.window or sizes[0], rows.scale),
    )


def _heads(
    q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, rows: Rows
) -> Any:
    call = packed(rows, rotation, len(q), q.shape[1], k.shape[1], q.shape[2])
    call.q, call.k, call.v = map(address, (q, k, v))
    call.q_row, call.k_row, call.v_row = (tensor.stride(0) for tensor in (q, k, v))
    return ctypes.byref(call)


def _sizes(q: Tensor, rows: Rows) -> list[Any]:
    return [NUMBER(rows.longest), NUMBER(q.shape[2])]


def _score_sizes(scores: Tensor, within: tuple[Tensor, Tensor]) -> list[Any]:
    blocks, kv_heads, rows, keys = scores.shape
    queries = within[0].shape[1]
    return [NUMBER(n) for n in (blocks, kv_heads * rows // queries, queries, keys)]


_shapes_only = False


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Accept meta and fake tensors like real ones; nothing is computed."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def address(tensor: Tensor | None) -> int | None:
    """The data pointer of a tensor; a non-null dummy for meta tensors."""
    if tensor is None:
        return None
    return 1 if _shapes_only else tensor.data_ptr()


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The compiled functions for contiguous CPU tensors of the same dtype, or None."""
    dtype = tensors[0].dtype
    if dtype not in TYPES or not all(_fits(tensor, dtype) for tensor in tensors):
        return None
    found, _ = library()
    return None if found is None else _kernels(dtype, _shapes_only)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    real = type(tensor) in (Tensor, torch.nn.Parameter) or _shapes_only
    return real and tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()


@cache
def _kernels(dtype: torch.dtype, shapes_only: bool) -> Kernels:
    return Kernels(None if shapes_only else library()[0], TYPES[dtype])


def readable(x: Tensor) -> Tensor:
    """`x`, copied unless its last two dimensions are contiguous; the token stride is free."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
