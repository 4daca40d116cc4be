"""Compile ``kernels.c`` into a shared library for this machine.

It is compiled once, in two seconds, with the system's compiler (``cc``), and cached in
``~/.cache/xtuner/kernels``. XTUNER_COMPILE=0 disables the kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from xtuner.device.compile import compile_library, cpu_flags, find_compiler

SOURCE = Path(__file__).with_name("kernels.c")
PARTS = (SOURCE, *sorted(set(SOURCE.parent.glob("*.c")) - {SOURCE}))
"""The file to compile and the files it includes."""
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)


def state() -> str:
    """One phrase for the console: the kernels are used, or why not."""
    return library()[1]


@cache
def has_products() -> bool:
    """Whether the compiler and the CPU support bfloat16 products."""
    found, _ = library()
    return found is not None and hasattr(found, "attention_bfloat16")


def _flags() -> tuple[str, ...]:
    """Compiler flags for this CPU: 512-bit vectors, which compilers avoid by default, and AMX if
    the CPU has it and the operating system grants it to this process."""
    flags, known = list(FLAGS), cpu_flags()
    if " avx512f" in known:
        flags.append("-mprefer-vector-width=512")
    if " amx_bf16" in known and may_use_tiles():
        flags.append("-DTILES")
    return tuple(flags)


def may_use_tiles() -> bool:
    """Request permission to use AMX tiles (Linux: Documentation/arch/x86/xstate.rst); return
    whether it was granted."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    return False


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library or None, and the phrase for the console."""
    if os.environ.get("XTUNER_COMPILE") == "0":
        return None, "compiled CPU kernels are disabled (XTUNER_COMPILE=0)"
    compiler = find_compiler("cc", "gcc", "clang")
    if compiler is None:
        return None, "no C compiler (cc) for the CPU kernels: training is up to 3 times slower"
    try:
        before = openmp_runtimes()
        found = ctypes.CDLL(str(_compiled(compiler)))
        if second := openmp_runtimes() - before:
            return None, (
                "CPU kernels are not used: they would load a second OpenMP runtime "
                f"({min(second)}), and two thread pools slow each other down"
            )
        return found, "compiled CPU kernels"
    except subprocess.CalledProcessError as error:
        reason = next(iter(error.stderr.strip().splitlines()), "no reason given")
    except PermissionError as error:
        return None, f"CPU kernels are not used, training is slower without them: {error}"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    return None, f"CPU kernels could not be compiled, training is slower without them: {reason}"


def openmp_runtimes() -> set[str]:
    """Paths of the OpenMP runtimes loaded into this process (Linux only)."""
    with contextlib.suppress(OSError):
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {path for path in paths if re.search(r"/lib(gomp|iomp5?|omp)[^/]*\.so", path)}
    return set()


def _compiled(compiler: str) -> Path:
    """The library for this machine, compiled unless it is cached.

    Raises:
        PermissionError: Other users can write to the cache.
    """
    return compile_library("kernels", PARTS, [compiler, *_flags(), str(SOURCE), "-lm"])
