"""The memory and disk space available to a run."""

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
    """Bytes that `processes` like this one can use on `device`, including what they already hold.

    Raises:
        LaunchError: There is no GPU.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise LaunchError(
                "this machine has no GPU: give the memory of the target GPU, e.g. --memory 8GB"
            )
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
    """Parse a size such as '8GB', '7.5 GiB' or '6000MB' to bytes; GB and MB are powers of two, as
    in GPU specifications.

    Raises:
        ConfigError: It is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])i?B?\s*", text, re.IGNORECASE)
    if match is None or not math.isfinite(size := float(match[1])) or size <= 0:
        raise ConfigError(f"--memory {text!r}: not a size; give one such as 8GB, 7.5GB or 6000MB")
    return int(size * (2**30 if match[2].upper() == "G" else 2**20))


def check_disk(work_dir: Path, size: int, *, limit: int) -> str:
    """Compare the size of a checkpoint with the free disk space; return a line about it.

    Raises:
        LaunchError: Not even one checkpoint fits.
    """
    free = shutil.disk_usage(work_dir).free
    if size > free:
        raise LaunchError(
            f"a checkpoint takes about {size / _MB:,.0f} MiB and {work_dir} has {free / _MB:,.0f} "
            "MiB free: free some disk space, or choose another folder with --work-dir"
        )
    at_once = 2 if limit < 0 else limit + 1
    kept = "all" if limit < 0 else limit
    line = f"Checkpoints  about {size / _MB:,.0f} MiB each, {kept} kept; {free / _MB:,.0f} MiB free"
    return line + ("; this may not suffice for all of them" if size * at_once > free else "")
