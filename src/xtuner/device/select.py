"""Choose the device and the dtype of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from xtuner.errors import LaunchError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FLOAT16_OVERFLOWS = (
    "float16 overflows above 65,504, which activations of many models exceed: set "
    "dtype = 'float32', or train on a GPU with bfloat16 (Ampere or later)"
)
"""Hint for overflows in the forward pass."""


def pick_device(name: Literal["auto", "cpu", "cuda"] = "auto") -> str:
    """Return 'cuda' or 'cpu'.

    Raises:
        LaunchError: 'cuda' is requested, but there is no usable GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise LaunchError(
            "device = 'cuda': torch finds no GPU; set device = 'cpu', or install a CUDA build of "
            "torch"
        )
    return name


def has_fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; assumed for a GPU that is not
    present, as in a memory forecast."""
    if device == "cuda":
        return not torch.cuda.is_available() or bool(
            torch.cuda.is_bf16_supported(including_emulation=False)
        )
    features = torch.backends.cpu.get_cpu_capability()
    return features.startswith("AVX512") and _cpu_flag("avx512_bf16")


def _cpu_flag(flag: str) -> bool:
    try:
        return f" {flag} " in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def name_of(dtype: torch.dtype) -> str:
    """The name of `dtype` in settings, such as 'bfloat16'."""
    return str(dtype).removeprefix("torch.")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The torch dtype for `name`; 'auto' is bfloat16 if `device` supports it in hardware, else
    float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    fast = device == "cuda" or has_fast_bfloat16(device)
    return half_dtype(device) if fast else torch.float32


def half_dtype(device: str) -> torch.dtype:
    """The 16-bit dtype for `device`: bfloat16, or float16 on a GPU without it (Turing or
    earlier)."""
    return torch.float16 if device == "cuda" and not has_fast_bfloat16(device) else torch.bfloat16
