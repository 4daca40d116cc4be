"""Compile C and C++ sources with the system's compiler, once per machine."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from xtuner.cache_dir import cache_dir
from xtuner.device.ownership import refuse_others


def find_compiler(*names: str) -> str | None:
    """The path of the first of `names` that is on the PATH, or None."""
    return next(filter(None, map(shutil.which, names)), None)


def cpu_flags() -> str:
    """The instruction sets of this CPU as reported by the system."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def compile_library(folder: str, sources: Iterable[Path], command: list[str]) -> Path:
    """Compile a shared library unless it is in the cache, and return its path.

    Args:
        folder: Subfolder of the cache.
        sources: Files that the result depends on.
        command: The compiler and its arguments, without ``-o``.

    Raises:
        PermissionError: Other users can write to the library or its folder.
        subprocess.CalledProcessError: The compiler reports an error.
        subprocess.TimeoutExpired: Compiling takes more than two minutes.
    """
    tool = Path(command[0]).resolve()
    version = f"{tool} {tool.stat().st_size} {tool.stat().st_mtime_ns}"
    texts = [source.read_text() for source in sources]
    key = "\n".join((*texts, version, *command[1:], platform.machine(), cpu_flags()))
    path = cache_dir() / folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_others(path.parent)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            output = Path(temporary) / "output.so"
            command = [*command, "-o", str(output)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
            output.chmod(0o700)
            output.replace(path)
    refuse_others(path)
    return path
