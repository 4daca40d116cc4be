"""Describe the machine and the kernels in use."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import torch

from gpucheck.bench import MB, Bench
from gpucheck.rows import Row, fact

PACKAGES = (
    "transformers",
    "peft",
    "bitsandbytes",
    "triton",
    "liger-kernel",
    "flash-attn",
    "kernels",
    "accelerate",
)
WIDTHS = (64, 80, 96, 128, 256)


def machine(bench: Bench) -> Iterator[Row]:
    """The GPU, versions, the rate of a matmul; attention and Liger kernels."""
    if bench.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        yield fact("card", f"{about.name}, compute capability {about.major}.{about.minor}")
        yield fact("memory", f"{free / MB:,.0f} of {total / MB:,.0f} MiB free")
    else:
        yield fact("card", "none: the CPU computes")
    yield fact("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    yield fact("packages", ", ".join(f"{name} {_version(name)}" for name in PACKAGES))
    yield fact("computes in", str(bench.dtype).removeprefix("torch."))
    rate = bench.rate_of_card()
    yield fact("matmul rate in this dtype", f"{rate / 1e12:,.1f} TFLOP/s")
    if bench.device == "cuda":
        yield from _ways(bench)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _ways(bench: Bench) -> Iterator[Row]:
    from xtuner.kernels.attention.call import AttentionCall
    from xtuner.kernels.attention.varlen import choose
    from xtuner.kernels.fused import liger

    device = torch.device("cuda", 0)
    for width in WIDTHS:
        try:
            call = AttentionCall(device, bench.dtype, 8, 2, width, width, width**-0.5)
            found = choose(call).line()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        yield fact(f"attention of packed rows, heads of {width}", found)
    with_kernels = liger.state(device)
    yield fact("liger", with_kernels)
