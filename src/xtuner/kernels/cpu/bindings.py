"""The element-wise parts of a step, and attention, as compiled loops for CPUs.

See ``kernels.c`` and what it includes for formulas, and `cpu_library` for how they are
compiled; where they are not there, every caller does the same with torch. They share torch's
threads, and take bfloat16 and float32; attention and linear layers take bfloat16 alone.
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
    """Which tokens of a packed row see each other.

    Args:
        boundaries: where each sample begins, then the number of tokens.
        window: a token sees itself and the ``window - 1`` tokens before it in its sample.
        scale: factor of the scores.
    """

    def __init__(self, cu_seqlens: tuple[int, ...], window: int | None, scale: float):
        # the longest first: at the end threads wait for the last one
        samples = sorted(
            ((end - start, start) for start, end in itertools.pairwise(cu_seqlens)), reverse=True
        )
        numbers = ctypes.c_int32 * len(samples)
        self.lengths = numbers(*(length for length, _ in samples))
        self.starts = numbers(*(start for _, start in samples))
        self.longest = samples[0][0]
        self.window, self.scale = window, scale


class Kernels:
    """The compiled functions for one number type; tensors must be contiguous where not said."""

    def __init__(self, library: ctypes.CDLL | None, suffix: str):
        self._library, self._suffix = library, suffix

    def call(self, name: str, *arguments: Any) -> None:
        """Call the C function `name` for this type, with torch's threads."""
        if self._library is None:  # tensors without values
            return
        function = getattr(self._library, f"{name}_{self._suffix}")
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        function(*values, FLAG(torch.get_num_threads()))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """``[..., H]`` normalised, and the factor of each row in float32."""
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
        """Softmax of ``scale * scores`` over the keys that each query sees, in place.

        Args:
            scores: ``[n, kv_heads, group * b, w]``.
            within: first key, and last key + 1, of each query; int32 ``[n, b]``.
            scale: factor of the scores.
        """
        self.call("softmax_within", scores, *within, *_score_sizes(scores, within), REAL(scale))
        return scores

    def softmax_within_backward(
        self, grad: Tensor, weights: Tensor, within: tuple[Tensor, Tensor], scale: float
    ) -> Tensor:
        """Gradient of the scores, in the place of `grad`, the gradient of the weights."""
        sizes = _score_sizes(grad, within)
        self.call("softmax_within_backward", grad, weights, *within, *sizes, REAL(scale))
        return grad

    def rotate_out(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, out: Tensor, place: Tensor,
        head_stride: int,
    ) -> Tensor:  # fmt: skip
        """Put each head of `x` to ``out.flatten()[place[token] + head * head_stride:]``, rotated.

        Args:
            x: ``[N, heads, D]``, the last two dimensions contiguous.
            rotation: cosines and sines, float32 ``[N, D]``, or None.
            out: where to.
            place: int64 ``[N]``.
            head_stride: numbers from one head to the next.
        """
        cos, sin = rotation or (None, None)
        sizes = [NUMBER(n) for n in (*x.shape, x.stride(0), head_stride)]
        self.call("rotate_out", x, cos, sin, out, place, *sizes)
        return out

    def rotate_back(
        self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, out: Tensor, place: Tensor,
        head_stride: int,
    ) -> Tensor:  # fmt: skip
        """Take a gradient back the way of `rotate_out`, from `x` into ``out [N, heads, D]``."""
        cos, sin = rotation or (None, None)
        sizes = [NUMBER(n) for n in (*out.shape, out.stride(0), head_stride)]
        self.call("rotate_back", x, cos, sin, out, place, *sizes)
        return out

    def add_windows(self, part: Tensor, total: Tensor, starts: Tensor, tile: int) -> None:
        """Add ``part [n, heads, w, D]`` to ``total [heads, N, D]`` (float32) from ``starts [n]``
        on; all are multiples of `tile`."""
        blocks, heads, keys, width = part.shape
        sizes = [NUMBER(n) for n in (blocks, heads, keys, total.shape[1], width, tile)]
        self.call("add_windows", part, total, starts, *sizes)

    def multiplies(self, inner: int) -> bool:
        """Whether there are products over an `inner` dimension."""
        return self._suffix == "bfloat16" and inner > 0 and inner % 2 == 0 and has_products()

    def attends(self, width: int) -> bool:
        """Whether `attention` is there for heads of `width`."""
        return width % 32 == 0 and width <= 256 and self.multiplies(width)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        """Output ``[N, heads, D]``, and the logarithms of the softmax's sums, ``[heads, N]``.

        Args:
            q: ``[N, heads, D]``; its tokens any distance apart, as those of `k` and `v`.
            k: ``[N, kv_heads, D]``.
            v: ``[N, kv_heads, D]``.
            rotation: cosines and sines, float32 ``[N, D]``, or None.
            rows: who sees whom.
        """
        out, logs = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        space = self.room("attention_room", *_sizes(q, rows), FLAG(False))
        self.call("attention", _heads(q, k, v, rotation, rows), out, logs, space)
        return out, logs

    def attention_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None,
        rows: Rows, out: Tensor, logs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of `q`, `k` and `v`; `grad` and `out` are contiguous."""
        grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        parts = q.new_empty(2, q.shape[1], q.shape[0], q.shape[2], dtype=torch.float32)
        heads = _heads(q, k, v, rotation, rows)
        space = self.room("attention_room", *_sizes(q, rows), FLAG(True))
        self.call("attention_backward", heads, out, logs, grad, *grads, parts, space)
        return grads

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, across: bool = False) -> Tensor:
        """``a [M, K]`` times ``b [K, N]``, or ``b [N, K]`` if `across`, into ``out [M, N]``; K is
        even."""
        columns = out.shape[1]
        sizes = [NUMBER(n) for n in (len(a), columns, a.shape[1])]
        room = self.room("product_room", *sizes)
        self.call("product", a, b, out, *sizes, FLAG(across), room)
        return out

    def room(self, name: str, *arguments: Any) -> Tensor:
        """Working memory for a call, for all threads, as the C function `name` measures it."""
        size = self.measure(name, *arguments, FLAG(torch.get_num_threads()))
        return scratch_buffer("compiled functions", size, torch.uint8, torch.device("cpu"))

    def measure(self, name: str, *arguments: Any) -> int:
        """Bytes, as the C function `name` tells them."""
        function: Any = getattr(library()[0], f"{name}_{self._suffix}")
        function.restype = NUMBER
        return int(function(*arguments))

    def cross_entropy(self, logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
        """Loss of each row in float32; with `gradient` the logits become their own gradient.

        Raises:
            IndexError: a target is no word; the loop would write beyond the row.
        """
        rows, words = logits.shape
        if self._library is not None and rows:
            least, most = (int(x) for x in torch.aminmax(targets))
            if least < 0 or most >= words:
                wrong = least if least < 0 else most
                raise IndexError(f"target {wrong} is not among the model's {words} words")
        loss = logits.new_empty(rows, dtype=torch.float32)
        sizes = NUMBER(rows), NUMBER(words), FLAG(gradient)
        self.call("cross_entropy", logits, targets, loss, *sizes)
        return loss


def packed(rows: Rows, rotation: tuple[Tensor, Tensor] | None, *sizes: int) -> Packed:
    """Which of so many tokens, heads, heads of keys, and numbers in a head see each other."""
    places = [address(angles) for angles in rotation or (None, None)]
    return Packed(
        *(None, None, None, *places, rows.starts, rows.lengths, len(rows.starts), *sizes),
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
    """Let tensors without values pass through, as real ones would; nothing is computed."""
    global _shapes_only
    before, _shapes_only = _shapes_only, True
    try:
        yield
    finally:
        _shapes_only = before


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; one without values is there, but nowhere."""
    if tensor is None:
        return None
    return 1 if _shapes_only else tensor.data_ptr()


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The compiled functions for tensors of one type that lie in a CPU's memory, or None."""
    dtype = tensors[0].dtype
    if dtype not in TYPES or not all(_fits(tensor, dtype) for tensor in tensors):
        return None
    found, _ = library()
    return None if found is None else _kernels(dtype, _shapes_only)


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    real = type(tensor) in (Tensor, torch.nn.Parameter) or _shapes_only
    return real and tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.is_contiguous()


@cache
def _kernels(dtype: torch.dtype, shapes_alone: bool) -> Kernels:
    return Kernels(None if shapes_alone else library()[0], TYPES[dtype])


def readable(x: Tensor) -> Tensor:
    """`x` with heads side by side and tokens any distance apart, as the kernels read it."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
