"""Where a run writes: its work dir and the log folder of each start."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from xtuner.engine.checkpoint import CheckpointStore


@dataclass(frozen=True)
class RunDirs:
    """The folders of a run: its work dir, and the time-stamped log folder of this start in it."""

    work_dir: Path
    log_dir: Path

    @classmethod
    def prepare(cls, work_dir: Path) -> RunDirs:
        """Create the folders of a run that has claimed `work_dir` (see `earlier_run`)."""
        CheckpointStore(work_dir).tidy()
        log_dir = work_dir / time.strftime("%Y%m%d_%H%M%S")
        for number in range(1, 1000):
            with contextlib.suppress(FileExistsError):
                log_dir.mkdir(parents=True)
                break
            log_dir = log_dir.with_name(f"{log_dir.name.split('-')[0]}-{number}")
        return cls(work_dir, log_dir)
