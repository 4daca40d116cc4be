"""The memory and the disk that a run may use."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import psutil
import torch

from xtuner.errors import ConfigError, LaunchError

_MB = 2**20


def free_memory(device: str, processes: int = 1) -> int:
    """Bytes that `processes` like this one could take on `device`, with what they hold already.

    Raises:
        LaunchError: there is no GPU.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LaunchError("there is no GPU here: say how much memory it has, as --memory 8GB")
        return int(torch.cuda.mem_get_info()[0])
    held = int(psutil.Process().memory_info().rss)
    free = int(psutil.virtual_memory().available) + processes * held
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            free = min(free, int(Path(file).read_text()))
        except (OSError, ValueError):
            continue
    return free


def parse_memory(text: str) -> int:
    """Bytes of a size such as '8GB', '7.5 GiB' or '6000MB'; GB and MB count in powers of two, as
    GPUs are sold.

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if match is None or not math.isfinite(size := float(match[1])) or size <= 0:
        raise ConfigError(f"--memory {text!r}: is no size; give one such as 8GB, 7.5GB or 6000MB")
    return int(size * (2**30 if match[2].upper() == "G" else 2**20))


def check_disk(work_dir: Path, size: int, *, limit: int) -> str:
    """Compare the size of a checkpoint with the free disk; return a line about it.

    Raises:
        LaunchError: not even one checkpoint fits.
    """
    free = shutil.disk_usage(work_dir).free
    if size > free:
        raise LaunchError(
            f"a checkpoint takes about {size / _MB:,.0f} MiB and {work_dir} has {free / _MB:,.0f} "
            "MiB free: make room, or choose another place with --work-dir"
        )
    at_once = 2 if limit < 0 else limit + 1
    kept = "all" if limit < 0 else limit
    line = f"Checkpoints  about {size / _MB:,.0f} MiB each, {kept} kept; {free / _MB:,.0f} MiB free"
    return line + ("; this may not be enough for all of them" if size * at_once > free else "")
