"""The record of one start of a run: ``run_record.json`` in its log folder.

Written at the start with everything that the report cannot find elsewhere, and again at the end
with the outcome. A run that was killed has a record without an end.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

FILE_NAME = "run_record.json"
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"


@dataclass(frozen=True)
class RunRecord:
    """Facts of one start of a run.

    Attributes:
        name: Name of the settings.
        settings: All settings, resolved.
        changed: Names of the settings that were given, not left at their defaults.
        versions: Library name to version.
        device, dtype: The device and the dtype of the computation.
        processes: Number of processes.
        total_steps, start_step: The steps at which the run ends and at which this start began.
        lines: What the run printed before the first step.
        forecast: Bytes of the forecast by name (`peak`, `weights`, `optimizer`, `step`,
            `libraries`, and `available`); empty if it failed.
        started, ended: Seconds since the epoch; 0 if it has not ended.
        outcome: 'finished', 'interrupted' or 'failed'; empty until the end.
        message: The error of a failed run.
        host, python: Machine name and Python version.
    """

    name: str
    settings: Mapping[str, Any]
    changed: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    dtype: str = ""
    processes: int = 1
    total_steps: int = 0
    start_step: int = 0
    lines: tuple[str, ...] = ()
    forecast: Mapping[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    ended: float = 0.0
    outcome: str = ""
    message: str = ""
    host: str = field(default_factory=socket.gethostname)
    python: str = field(default_factory=platform.python_version)

    @property
    def base_model(self) -> str:
        """The model that the run started from."""
        return str(self.settings["pretrained_model_name_or_path"])

    def ending(self, outcome: str, message: str = "") -> RunRecord:
        """The record with its end, now."""
        return replace(self, outcome=outcome, message=message, ended=time.time())

    def write(self, log_dir: Path) -> None:
        """Write ``log_dir/run_record.json``; a reader sees the old file or the new one."""
        draft = log_dir / f".{FILE_NAME}.writing"
        draft.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(draft, log_dir / FILE_NAME)

    @classmethod
    def read(cls, log_dir: Path) -> RunRecord | None:
        """Read ``log_dir/run_record.json``; None if it is missing or damaged."""
        try:
            values = json.loads((log_dir / FILE_NAME).read_text(encoding="utf-8"))
            values["changed"], values["lines"] = tuple(values["changed"]), tuple(values["lines"])
            return cls(**values)
        except (OSError, ValueError, TypeError, LookupError):
            return None
