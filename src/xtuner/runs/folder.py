"""Read a work dir: its starts, numbers, sample answers, data report and checkpoints.

    work_dir/20261128_101500/   run_record.json, scalars.jsonl, sample_answers.jsonl,
                                data_report.json, <time>.log
            /iter_N/            checkpoints

A run that was resumed has several starts. Their numbers are joined: a later start replaces the
steps that it repeats, and one that begins at step 0 replaces everything before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from xtuner.engine import run_lock
from xtuner.engine.hooks.evaluation import ANSWERS_FILE
from xtuner.errors import CheckpointError
from xtuner.models.references import checkpoints_in
from xtuner.runs.record import RunRecord

SCALARS_FILE = "scalars.jsonl"
REPORT_FILE = "report.html"
MERGED = "merged_"
"""Begins the name of a checkpoint that `xtuner web` merged into its base model."""
RUNNING, KILLED = "running", "killed"

_LOG_DIR = re.compile(r"\d{8}_\d{6}(-\d+)?")


@dataclass(frozen=True)
class Evaluation:
    """The sample answers at one step.

    Attributes:
        step: Optimizer steps done.
        when: A description, such as 'before training'.
        answers: Rows with `question`, `images` and `answer`.
    """

    step: int
    when: str
    answers: tuple[Mapping[str, Any], ...]


class RunFolder:
    """The files of a run in `work_dir`.

    Raises:
        CheckpointError: `work_dir` is not the work dir of a run.
    """

    def __init__(self, work_dir: Path) -> None:
        self.work_dir = Path(work_dir)
        if not self.starts:
            raise CheckpointError(
                f"{work_dir}: is not the work dir of a run; it contains no log folder, such as "
                "20261128_101500"
            )

    @cached_property
    def starts(self) -> list[Path]:
        """The log folders that belong to the state of the run, oldest first."""
        found = sorted(
            path
            for path in self.work_dir.glob("*")
            if _LOG_DIR.fullmatch(path.name) and path.is_dir()
        )
        fresh = [i for i, path in enumerate(found) if _first_step(path) == 0]
        return found[fresh[-1] if fresh else 0 :]

    @property
    def record(self) -> RunRecord | None:
        """The record of the last start that has one; None for a run of an earlier version of
        xtuner."""
        return self.records[-1] if self.records else None

    @cached_property
    def records(self) -> list[RunRecord]:
        """The records of all starts."""
        return [record for path in self.starts if (record := RunRecord.read(path))]

    @property
    def name(self) -> str:
        """The name of the work dir."""
        return self.work_dir.resolve().name

    @cached_property
    def scalars(self) -> list[dict[str, float]]:
        """The numbers of each step, in order, with `step` and `epoch`."""
        merged: dict[int, dict[str, float]] = {}
        for path in self.starts:
            lines = list(json_lines(path / SCALARS_FILE))
            if not lines:
                continue
            first = min(int(line["step"]) for line in lines)
            merged = {step: line for step, line in merged.items() if step < first}
            for line in lines:
                merged.setdefault(int(line["step"]), {}).update(line)
        return [merged[step] for step in sorted(merged)]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of scalar `name` where it was measured."""
        return [(int(line["step"]), float(line[name])) for line in self.scalars if name in line]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.scalars[-1]["step"]) if self.scalars else 0

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The sample answers, in order of their steps."""
        found: dict[int, Evaluation] = {}
        for path in self.starts:
            for line in json_lines(path / ANSWERS_FILE):
                step = int(line["step"])
                answers = tuple(line["answers"])
                found[step] = Evaluation(step, str(line["when"]), answers)
        return [found[step] for step in sorted(found)]

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """The data report of the last start that has one; else empty."""
        for log_dir in reversed(self.starts):
            try:
                text = (log_dir / "data_report.json").read_text(encoding="utf-8")
                return dict(json.loads(text))
            except (OSError, ValueError):
                continue
        return {}

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        return checkpoints_in(self.work_dir)

    def merged(self) -> list[Path]:
        """Models that were merged from checkpoints, by name."""
        folders = self.work_dir.glob(f"{MERGED}*")
        return sorted(path for path in folders if (path / "config.json").is_file())

    def status(self) -> str:
        """'running', 'finished', 'interrupted', 'failed' or 'killed'.

        Not to be called by the process of the run itself, whose lock would be released.
        """
        if run_lock.is_held(self.work_dir):
            return RUNNING
        record = self.record
        return (record.outcome if record else "") or KILLED


def _first_step(log_dir: Path) -> int | None:
    """The step at which the start in `log_dir` began; None while it is loading."""
    if record := RunRecord.read(log_dir):
        return record.start_step
    first = next(json_lines(log_dir / SCALARS_FILE), None)
    return max(0, int(first["step"]) - ("loss" in first)) if first else None


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects in `file`; a line that is being written, or was when the run was killed, is left
    out."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and "step" in value:
                yield value
