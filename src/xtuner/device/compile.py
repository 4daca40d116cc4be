"""Compile C and C++ sources with the system's compiler, once per machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

from xtuner.device.ownership import refuse_others


def find_compiler(*names: str) -> str | None:
    """The first compiler of `names` on the PATH."""
    return next(filter(None, map(shutil.which, names)), None)


def cpu_flags() -> str:
    """The instruction sets of this CPU, as the system names them."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return platform.processor()


def compile_library(folder: str, sources: Iterable[Path], command: list[str]) -> Path:
    """Compile a shared library, or find it in the cache of this machine.

    Args:
        folder: the folder of the cache.
        sources: files that the result depends on.
        command: the compiler and its arguments, without ``-o``.

    Raises:
        PermissionError: another user could have written the library or its folder.
        subprocess.CalledProcessError: the compiler refuses it.
        subprocess.TimeoutExpired: it takes more than two minutes.
    """
    tool = Path(command[0]).resolve()
    version = f"{tool} {tool.stat().st_size} {tool.stat().st_mtime_ns}"
    texts = [source.read_text() for source in sources]
    known = "\n".join((*texts, version, *command[1:], platform.machine(), cpu_flags()))
    home = Path(os.environ.get("XTUNER_CACHE") or "~/.cache/xtuner").expanduser()
    path = home / folder / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    refuse_others(path.parent)
    if not path.is_file():
        with tempfile.TemporaryDirectory(dir=path.parent) as place:
            made = Path(place) / "made.so"
            whole = [*command, "-o", str(made)]
            subprocess.run(whole, check=True, capture_output=True, text=True, timeout=120)
            made.chmod(0o700)
            made.replace(path)
    refuse_others(path)
    return path
