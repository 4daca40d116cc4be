"""A fake CUDA device: run a program as on a GPU where there is none.

    python -m xtuner.testing.fake_cuda.device xtuner.cli.app train my_settings.py --device cuda

Tensors claim to lie on the device ``cuda`` and are computed by the CPU (`fake_cuda.cpp`), so this
tells what goes wrong between CPU and GPU, what is waited for, and how much memory tensors take,
and says nothing about speed, CUDA's own kernels, or what its allocator loses between blocks. Flash
attention is done by its formula (`fake_attention.py`). Everything is done when it is asked for, so
what is read too early is not noticed; CPU and card draw the same random numbers from one place;
CUDA's streams, events and graphs are not there. Needs a C++ compiler and a torch without CUDA;
$FAKE_CUDA_MIB is the memory of the card (8,192), $FAKE_CUDA_CAPABILITY its compute capability (9.0;
7.5 imitates a T4, which has no bfloat16). The last line on stderr is a report.
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
NAME = "a fake CUDA device"


class FakeCuda:
    """The card, once it is there: what its tensors hold, in bytes."""

    def __init__(self, library: ctypes.CDLL, memory: int):
        self._library = library
        self.registered: Any = None  # functions of the card, for as long as this lives
        for name in ("fake_held", "fake_most", "fake_waits", "fake_plans"):
            getattr(library, name).restype = ctypes.c_int64
        library.fake_limit.argtypes = [ctypes.c_int64]
        self.limit(memory)

    @property
    def held(self) -> int:
        """Now."""
        return int(self._library.fake_held())

    @property
    def most(self) -> int:
        """At most, since `forget_most`."""
        return int(self._library.fake_most())

    @property
    def waits(self) -> int:
        """How often the CPU had to wait for a result of the card."""
        return int(self._library.fake_waits())

    @property
    def plans(self) -> int:
        """How often SDPA was called where a Hopper card takes cuDNN's attention, which plans."""
        return int(self._library.fake_plans())

    def without_waits(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose own waits are not counted."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self._library.fake_unseen(1)
            try:
                return function(*args, **kwargs)
            finally:
                self._library.fake_unseen(0)

        return called

    def limit(self, memory: int) -> None:
        """Let tensors hold so many bytes."""
        self.memory = memory
        self._library.fake_limit(memory)

    def wait(self) -> None:
        """The CPU waits once."""
        self._library.fake_wait()

    def forget_most(self) -> None:
        """Count the most from now on."""
        self._library.fake_forget_most()


def install(memory: int, capability: tuple[int, int] | None = None) -> FakeCuda:
    """Put a card with `memory` bytes into this process; to be called before torch is imported.

    `capability` is what NVIDIA calls compute capability, by default that of
    $FAKE_CUDA_CAPABILITY, else 9.0; below 8.0 there is no bfloat16.

    Raises:
        RuntimeError: torch is there already, or knows CUDA, or there is no C++ compiler.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; a fake CUDA device has to come before it")
    if capability is None:
        named = os.environ.get("FAKE_CUDA_CAPABILITY", "9.0").split(".")
        capability = int(named[0]), int(named[1])
    major, minor = capability
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes compiles what a GPU has ready
    library = ctypes.CDLL(str(prepare()))
    library.fake_capability(10 * major + minor)
    card = FakeCuda(library, memory)
    import bitsandbytes
    import torch
    import transformers  # noqa: F401  both look for a GPU when they are imported

    _pretend(torch, card, capability)
    _page_nothing(torch, bitsandbytes.functional)
    from xtuner.testing.fake_cuda import attention

    own = torch.library.Library("aten", "IMPL")
    for name, function in attention.functions(capability).items():
        own.impl(name, card.without_waits(function), "CUDA")
    card.registered = own
    return card


def find_compiler() -> str | None:
    """The path of a C++ compiler, if there is one."""
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def prepare() -> Path:
    """The device for the torch that is installed, compiled (ten seconds) if it is not there yet.

    Raises:
        RuntimeError: torch knows CUDA, or there is no C++ compiler.
    """
    compiler = find_compiler()
    spec = importlib.util.find_spec("torch")
    if compiler is None or spec is None or spec.origin is None:
        raise RuntimeError("a fake CUDA device needs torch and a C++ compiler (c++)")
    torch = Path(spec.origin).parent
    version = torch / "version.py"
    if "cuda: Optional[str] = None" not in version.read_text():
        raise RuntimeError("this torch knows CUDA; a fake CUDA device needs one that does not")
    include = torch / "include"
    command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE)]
    command += [f"-I{include}", f"-I{include}/torch/csrc/api/include", f"-L{torch}/lib"]
    command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    try:
        return compile_library("fake_cuda", (SOURCE, version), command)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"a fake CUDA device was not compiled:\n{error.stderr[-2000:]}"
        ) from error


def _pretend(torch: Any, card: FakeCuda, capability: tuple[int, int]) -> None:
    """Let ``torch.cuda`` speak of the card. It has no random numbers of its own."""
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
        "synchronize": lambda *_: card.wait(),
        "mem_get_info": lambda *_: (card.memory - card.held, card.memory),
        "memory_allocated": lambda *_: card.held,
        "memory_reserved": lambda *_: card.held,
        "max_memory_allocated": lambda *_: card.most,
        "max_memory_reserved": lambda *_: card.most,
        "reset_peak_memory_stats": lambda *_: card.forget_most(),
        "get_rng_state": lambda *_: state(),
        "set_rng_state": lambda new, *_: torch.random.set_rng_state(new),
        "get_rng_state_all": lambda: [state()],
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)


def _page_nothing(torch: Any, functional: Any) -> None:
    """Paged memory, which CPU and GPU both see, is the CPU's."""

    def get_paged(*shape: int, dtype: Any, device: Any) -> Any:
        out = torch.empty(shape, dtype=dtype)
        out.is_paged, out.page_deviceid = True, device.index
        return out

    functional.get_paged = get_paged
    functional.fill = lambda x, value, **_: x.fill_(value)
    functional.prefetch_tensor = lambda x, to_cpu=False: None


def main() -> None:
    """Run a module, as ``python -m`` does, and report."""
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
        report = {"most_mib": card.most / MB, "held_mib": card.held / MB}
        report |= {"waits": card.waits, "plans": card.plans}
        print(json.dumps(report), file=sys.stderr)


if __name__ == "__main__":
    main()
