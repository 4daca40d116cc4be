"""A fake CUDA device: run a program as on a GPU, without a GPU.

    python -m xtuner.testing.fake_cuda.device xtuner.cli.app train my_settings.py --device cuda

Tensors report the device ``cuda`` and are computed by the CPU (``device.cpp``). This shows device
mismatches, synchronizations and the memory of tensors, but says nothing about speed, CUDA kernels
or fragmentation. Flash attention is computed by its formula (`attention`). Operations are
synchronous, so missing synchronization is not detected; CPU and device share one random generator;
CUDA streams, events and graphs are not supported. Needs a C++ compiler and a torch without CUDA.
$FAKE_CUDA_MIB sets the memory (default 8192), $FAKE_CUDA_CAPABILITY the compute capability (default
9.0; 7.5 imitates a T4, which has no bfloat16). The last line on stderr is a report.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from xtuner.device.compile import compile_library

SOURCE = Path(__file__).with_suffix(".cpp")
MB = 2**20
NAME = "fake CUDA device"


class FakeCuda:
    """The installed device: its memory in bytes and its counters."""

    def __init__(self, library: ctypes.CDLL, memory: int):
        self._library = library
        self.registered: Any = None  # keeps the registered operations alive
        for name in ("fake_allocated", "fake_peak", "fake_syncs", "fake_cudnn_plans"):
            getattr(library, name).restype = ctypes.c_int64
        library.fake_limit.argtypes = [ctypes.c_int64]
        self.limit(memory)

    @property
    def allocated(self) -> int:
        """Bytes allocated now."""
        return int(self._library.fake_allocated())

    @property
    def peak(self) -> int:
        """Peak of `allocated` since `reset_peak`."""
        return int(self._library.fake_peak())

    @property
    def syncs(self) -> int:
        """How often the CPU synchronized with the device."""
        return int(self._library.fake_syncs())

    @property
    def cudnn_plans(self) -> int:
        """How often SDPA would have used cuDNN's attention on a Hopper GPU."""
        return int(self._library.fake_cudnn_plans())

    def uncounted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its synchronizations are not counted."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self._library.fake_uncounted(1)
            try:
                return function(*args, **kwargs)
            finally:
                self._library.fake_uncounted(0)

        return called

    def limit(self, memory: int) -> None:
        """Set the memory of the device in bytes."""
        self.memory = memory
        self._library.fake_limit(memory)

    def synchronize(self) -> None:
        """Count one synchronization."""
        self._library.fake_synchronize()

    def reset_peak(self) -> None:
        """Restart `peak` from the present allocation."""
        self._library.fake_reset_peak()


def install(memory: int, capability: tuple[int, int] | None = None) -> FakeCuda:
    """Install a device with `memory` bytes into this process, before torch is imported.

    `capability` is the compute capability, by default $FAKE_CUDA_CAPABILITY or 9.0; below 8.0 there
    is no bfloat16.

    Raises:
        RuntimeError: torch is already imported or has CUDA, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the fake CUDA device must be installed before torch is imported")
    if capability is None:
        named = os.environ.get("FAKE_CUDA_CAPABILITY", "9.0").split(".")
        capability = int(named[0]), int(named[1])
    major, minor = capability
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # CUDA has compiled kernels instead
    library = ctypes.CDLL(str(prepare()))
    library.fake_capability(10 * major + minor)
    card = FakeCuda(library, memory)
    import bitsandbytes
    import torch
    import transformers  # noqa: F401  both look for a GPU when they are imported

    _pretend(torch, card, capability)
    _disable_paging(torch, bitsandbytes.functional)
    from xtuner.testing.fake_cuda import attention

    own = torch.library.Library("aten", "IMPL")
    for name, function in attention.functions(capability).items():
        own.impl(name, card.uncounted(function), "CUDA")
    card.registered = own
    return card


def find_compiler() -> str | None:
    """The path of a C++ compiler, or None."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def prepare() -> Path:
    """The library for the installed torch, compiled (ten seconds) unless it is cached.

    Raises:
        RuntimeError: torch has CUDA, or there is no C++ compiler.
    """
    compiler = find_compiler()
    spec = importlib.util.find_spec("torch")
    if compiler is None or spec is None or spec.origin is None:
        raise RuntimeError("the fake CUDA device needs torch and a C++ compiler (c++)")
    torch = Path(spec.origin).parent
    version = torch / "version.py"
    if "cuda: Optional[str] = None" not in version.read_text():
        raise RuntimeError("the fake CUDA device needs a torch built without CUDA")
    include = torch / "include"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch}/lib"]
    command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    try:
        return compile_library("fake_cuda", (SOURCE, version), command)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"the fake CUDA device could not be compiled:\n{error.stderr[-2000:]}"
        ) from error


def _pretend(torch: Any, card: FakeCuda, capability: tuple[int, int]) -> None:
    """Patch ``torch.cuda`` to report the device, which shares the random state of the CPU."""
    state = torch.random.get_rng_state

    def properties(*_: Any) -> Any:
        return SimpleNamespace(
            name=NAME,
            major=capability[0],
            minor=capability[1],
            total_memory=card.memory,
            multi_processor_count=1,
        )

    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": NAME,
        "is_bf16_supported": capability >= (8, 0),
        **dict.fromkeys("_lazy_init set_device empty_cache manual_seed manual_seed_all".split()),
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
        "set_rng_state_all": None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    functions: dict[str, Callable[..., Any]] = {
        "get_device_properties": properties,
        "synchronize": lambda *_: card.synchronize(),
        "mem_get_info": lambda *_: (card.memory - card.allocated, card.memory),
        "memory_allocated": lambda *_: card.allocated,
        "memory_reserved": lambda *_: card.allocated,
        "max_memory_allocated": lambda *_: card.peak,
        "max_memory_reserved": lambda *_: card.peak,
        "reset_peak_memory_stats": lambda *_: card.reset_peak(),
        "get_rng_state": lambda *_: state(),
        "set_rng_state": lambda new, *_: torch.random.set_rng_state(new),
        "get_rng_state_all": lambda: [state()],
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


def _disable_paging(torch: Any, functional: Any) -> None:
    """Allocate the unified memory of paged optimizers on the CPU."""

    def get_paged(*shape: int, dtype: Any, device: Any) -> Any:
        out = torch.empty(shape, dtype=dtype)
        out.is_paged, out.page_deviceid = True, device.index
        return out

    functional.get_paged = get_paged
    functional.fill = lambda x, value, **_: x.fill_(value)
    functional.prefetch_tensor = lambda x, to_cpu=False: None


def main() -> None:
    """Run a module as ``python -m`` does and print the report."""
    memory = os.environ.get("FAKE_CUDA_MIB", "8192")
    if len(sys.argv) < 2 or not memory.isdecimal():
        sys.exit(
            "usage: [FAKE_CUDA_MIB=8192] [FAKE_CUDA_CAPABILITY=9.0] python -m "
            "xtuner.testing.fake_cuda.device MODULE [ARGUMENT ...], as xtuner.cli.app train "
            f"my_settings.py; got {sys.argv[1:]}, FAKE_CUDA_MIB={memory}"
        )
    card = install(int(memory) * MB)
    module, sys.argv = sys.argv[1], sys.argv[1:]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        report = {"peak_mib": card.peak / MB, "allocated_mib": card.allocated / MB}
        report |= {"syncs": card.syncs, "cudnn_plans": card.cudnn_plans}
        print(json.dumps(report), file=sys.stderr)


if __name__ == "__main__":
    main()
