"""Records a run next to its logs, and writes a report when it ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from xtuner.config.load import LoadedSettings
from xtuner.engine.hooks.base import Run
from xtuner.engine.signals import Interrupted
from xtuner.memory.plan import MemoryPlan
from xtuner.models.run_info import installed_versions
from xtuner.runs import report
from xtuner.runs.folder import REPORT_FILE
from xtuner.runs.record import FAILED, FINISHED, INTERRUPTED, RunRecord


@dataclass
class Recording:
    """The record of one start, on the main process.

    Attributes:
        record: The facts so far.
        log_dir: Where the record is written.
        work_dir: Where the report is written.
        console: Where the report's path is printed.
    """

    record: RunRecord
    log_dir: Path
    work_dir: Path
    console: Console

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Write the record on entering, and its end and the report on leaving."""
        self.record.write(self.log_dir)
        try:
            yield
        except Interrupted:
            self._end(INTERRUPTED)
            self.print_report()
            raise
        except Exception as error:
            self._end(FAILED, f"{type(error).__name__}: {error}")
            self.print_report()
            raise
        self._end(FINISHED)

    def _end(self, outcome: str, message: str = "") -> None:
        try:
            self.record = self.record.ending(outcome, message)
            self.record.write(self.log_dir)
            report.write(self.work_dir, status=outcome)
        except Exception as error:  # the run itself is complete
            if os.environ.get("XTUNER_STRICT"):
                raise
            self.console.print(f"Note: the report could not be written: {error}", markup=False)

    def print_report(self) -> None:
        """Print the path of the report."""
        path = self.work_dir / REPORT_FILE
        if path.is_file():
            self.console.print(f"Report: {path}", markup=False)


def recording(
    loaded: LoadedSettings,
    run: Run,
    plan: MemoryPlan,
    *,
    dtype: str,
    processes: int,
    lines: Sequence[str],
) -> Recording:
    """Create the recording of a run that is about to start.

    Args:
        loaded: The settings as given; those of `run` have numbers in place of 'auto'.
        dtype: The dtype of the computation.
        lines: The printed lines.
    """
    given = loaded.settings.model_fields_set
    expected = plan.forecast
    forecast = {
        "peak": expected.peak,
        "weights": expected.weights,
        "optimizer": expected.optimizer,
        "step": expected.footprint.step,
        "libraries": expected.libraries,
        "available": plan.memory,
    }
    record = RunRecord(
        name=loaded.name,
        settings=run.settings.model_dump(mode="json"),
        changed=tuple(name for name in type(run.settings).model_fields if name in given),
        versions=installed_versions(),
        device=plan.device,
        dtype=dtype,
        processes=processes,
        start_step=run.step,
        total_steps=run.total_steps,
        lines=tuple(line for text in lines for line in text.splitlines()),
        forecast={} if expected.failure else forecast,
    )
    return Recording(record, run.log_dir, run.work_dir, run.console)
