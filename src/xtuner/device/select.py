"""The device and the number type of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from xtuner.errors import LaunchError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: Literal["auto", "cpu", "cuda"] = "auto") -> str:
    """Return 'cuda' or 'cpu'.

    Raises:
        LaunchError: 'cuda' was asked for and there is no usable GPU.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise LaunchError(
            "device = 'cuda': torch sees no GPU; set device = 'cpu', or install a CUDA build of "
            "torch"
        )
    return name


def has_fast_bfloat16(device: str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware; a GPU that is not here (a forecast
    is made for one) is taken to."""
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


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The torch type for `name`; 'auto' is bfloat16 where `device` has it in hardware, else
    float32."""
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return DTYPES[name]
