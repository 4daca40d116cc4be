"""The compiled functions of ``kernels.c``, as a library for this machine.

It is compiled once, in two seconds, with the system's own compiler (``cc``), and kept in
``~/.cache/xtuner/kernels``. XTUNER_COMPILE=0 turns it off.
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
"""The file to compile, and what it includes."""
FLAGS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-shared", "-fPIC"),
)


def state() -> str:
    """What a run says about them."""
    return library()[1]


@cache
def has_products() -> bool:
    """Whether the compiler and the CPU know products of bfloat16 vectors."""
    found, _ = library()
    return found is not None and hasattr(found, "attention_bfloat16")


def _flags() -> tuple[str, ...]:
    """How to compile for this CPU: with vectors of 512 bits, of which compilers are shy, and with
    tile units (AMX) if it has them and the system gives them to this process, which it must be
    asked for (Linux: Documentation/arch/x86/xstate.rst)."""
    flags, known = list(FLAGS), cpu_flags()
    if " avx512f" in known:
        flags.append("-mprefer-vector-width=512")
    if " amx_bf16" in known and may_use_tiles():
        flags.append("-DTILES")
    return tuple(flags)


def may_use_tiles() -> bool:
    """Ask the system for the tile units of an Intel CPU; whether it gives them."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    return False


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None where there can be none, and a line that says so or why."""
    if os.environ.get("XTUNER_COMPILE") == "0":
        return None, "compiled CPU kernels are off (XTUNER_COMPILE = 0)"
    compiler = find_compiler("cc", "gcc", "clang")
    if compiler is None:
        return None, "no C compiler (cc): training takes up to three times as long as with one"
    try:
        before = openmp_runtimes()
        found = ctypes.CDLL(str(_compiled(compiler)))
        if second := openmp_runtimes() - before:
            return None, (
                f"CPU kernels are not used: beside torch's OpenMP they would need {min(second)}, "
                "and the threads of two hinder each other; torch does their work, slower"
            )
        return found, "compiled CPU kernels"
    except subprocess.CalledProcessError as error:
        reason = next(iter(error.stderr.strip().splitlines()), "no reason given")
    except PermissionError as error:
        return None, f"CPU kernels are not used ({error}): torch does their work, slower"
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    return None, f"CPU kernels could not be compiled ({reason}): torch does their work, slower"


def openmp_runtimes() -> set[str]:
    """Files of the OpenMP runtimes that this process holds, where the system tells."""
    with contextlib.suppress(OSError):
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
        return {path for path in paths if re.search(r"/lib(gomp|iomp5?|omp)[^/]*\.so", path)}
    return set()


def _compiled(compiler: str) -> Path:
    """The library for this machine, compiled if it is not there yet.

    Raises:
        PermissionError: others could have put it there.
    """
    return compile_library("kernels", PARTS, [compiler, *_flags(), str(SOURCE), "-lm"])
