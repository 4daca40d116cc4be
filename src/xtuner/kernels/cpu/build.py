"""The compiled functions of ``kernels.c``, as a library for this machine.

It is compiled once, in two seconds, with the system's own compiler (``cc``), and kept in
``~/.cache/xtuner/kernels``. XTUNER_COMPILE=0 turns it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

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
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
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


def cpu_flags() -> str:
    """What instructions this CPU knows; machines may share a home folder."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def _compiled(compiler: str) -> Path:
    """The library for this machine, compiled if it is not there yet.

    Raises:
        PermissionError: others could have put it there.
    """
    return compiled("kernels", PARTS, [compiler, *_flags(), str(SOURCE), "-lm"])


def compiled(folder: str, sources: Iterable[Path], command: list[str]) -> Path:
    """What `command`, a compiler and its arguments without ``-o``, makes of `sources` on this
    machine; kept in `folder` of the cache.

    Raises:
        PermissionError: others could have put it there.
        subprocess.CalledProcessError: it cannot be compiled.
        subprocess.TimeoutExpired: nor in two minutes.
    """
    tool = Path(command[0]).resolve()
    version = f"{tool} {tool.stat().st_size} {tool.stat().st_mtime_ns}"
    texts = [source.read_text() for source in sources]
    known = "\n".join((*texts, version, *command[1:], platform.machine(), cpu_flags()))
    home = Path(os.environ.get("XTUNER_CACHE") or "~/.cache/xtuner").expanduser()
    path = home / folder / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _refuse_others(path.parent)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / "made.so"
            whole = [*command, "-o", str(made)]
            subprocess.run(whole, check=True, capture_output=True, text=True, timeout=120)
            made.chmod(0o700)
            made.replace(path)
    _refuse_others(path)
    return path


def _refuse_others(path: Path) -> None:
    """Raise where somebody beside this user and root could have written what is run from here."""
    if os.name != "posix":
        return
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"others can write {path}, and what is in it would be run; delete it, or choose "
            "another folder with XTUNER_CACHE"
        )
