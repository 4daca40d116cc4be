"""The compiled CPU kernels, if the folder ``kernels/cpu`` exists and its library loads.

The only module that imports `xtuner.kernels.cpu`: with that folder deleted, or without a C
compiler, `kernels_for` returns None everywhere and torch does the same work.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from xtuner.kernels.cpu.bindings import Kernels as Kernels
    from xtuner.kernels.cpu.bindings import Rows as Rows
    from xtuner.kernels.cpu.lora_linear import Layer as Layer
else:
    Kernels = Rows = Layer = Any

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines, float32 ``[N, D]``, of rotary positions (arXiv:2104.09864, equation 34)."""

_FOLDER = "xtuner.kernels.cpu"


def _load(name: str) -> Any:
    try:
        return importlib.import_module(f"{_FOLDER}.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith(_FOLDER):
            raise
        return None


_bindings, _build, _attention = _load("bindings"), _load("build"), _load("attention")
lora_linear: Any = _load("lora_linear")
"""LoRA layers; use with the result of `kernels_for`."""
decoder: Any = _load("decoder")
"""Entire decoder layers; use with the result of `kernels_for`."""


def available() -> bool:
    """Whether the compiled kernels can be used."""
    return _build is not None and _build.library()[0] is not None


def has_products() -> bool:
    """Whether the kernels multiply bfloat16 matrices, which depends on the CPU and the compiler."""
    return _build is not None and bool(_build.has_products())


def state() -> str:
    """One phrase for the console: compiled kernels are used, or why not."""
    return _build.state() if _build else "torch's CPU kernels (xtuner's own are not installed)"


def kernels_for(*tensors: Tensor) -> Kernels | None:
    """The compiled functions for contiguous CPU tensors of the same dtype, or None."""
    return _bindings.kernels_for(*tensors) if _bindings else None


def readable(x: Tensor) -> Tensor:
    """``x [N, heads, D]``, copied unless its last two dimensions are contiguous, as the kernels
    require; the stride between tokens is free."""
    return _bindings.readable(x) if _bindings else x.contiguous()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Accept meta and fake tensors like real ones; nothing is computed."""
    if _bindings is None:
        yield
        return
    with _bindings.shapes_only():
        yield


@lru_cache(maxsize=8)
def rows_of(cu_seqlens: tuple[int, ...], window: int | None, scale: float) -> Rows:
    """The attention pattern of a packed row; see `bindings.Rows`."""
    rows: Rows = _bindings.Rows(cu_seqlens, window, scale)
    return rows


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation | None,
    rows: Rows,
    kernels: Kernels,
) -> Tensor:
    """The attention of a layer in one call; see `xtuner.kernels.cpu.attention`."""
    out: Tensor = _attention.attention(query, key, value, rotation, rows, kernels)
    return out
