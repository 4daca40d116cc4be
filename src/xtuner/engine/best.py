"""The best checkpoint of a run by a metric, and early stopping when it no longer improves."""

from __future__ import annotations

import math
from pathlib import Path

from xtuner.config.schema import Settings
from xtuner.engine.checkpoint import BEST_FILE
from xtuner.engine.hooks.base import Run
from xtuner.parallel.processes import Processes


class BestMetric:
    """Tracks the best value of `best_metric`.

    Args:
        work_dir: Holds the file `best_checkpoint`, from which a resumed run reads the best value.
        processes: The process group; all ranks make the same decision.

    Attributes:
        value: The best value so far; None before the first measurement.
        waited: Measurements since the best one.
    """

    def __init__(self, settings: Settings, work_dir: Path, processes: Processes) -> None:
        self._s, self._file, self._processes = settings, work_dir / BEST_FILE, processes
        self.value: float | None = None
        self.waited = 0
        self._compared_at = -1
        self._warned = False

    @property
    def wanted(self) -> bool:
        """Whether the settings use a metric."""
        return self._s.keep_best or self._s.early_stopping_patience is not None

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop early."""
        patience = self._s.early_stopping_patience
        return patience is not None and self.waited >= patience

    def resume(self) -> None:
        """Restore the best value of the run that is resumed."""
        words = self._file.read_text(encoding="utf-8").split() if self._file.is_file() else []
        if len(words) == 3 and words[1] == self._s.best_metric:
            self.value = float(words[2])

    def improves(self, run: Run) -> bool:
        """Return whether the metric was measured at this step and is the best so far.
        Collective."""
        if not self.wanted or self._compared_at == run.step:
            return False
        found = run.scalars.get(self._s.best_metric)
        here = [found] if found is not None and self._processes.is_main else []
        measured = self._processes.gather(here)
        if not measured:
            return False
        self._compared_at = run.step
        value = float(measured[0])
        sign = 1 if self._s.best_metric_goal == "min" else -1
        better = not math.isnan(value) and (self.value is None or sign * (value - self.value) < 0)
        self.waited = 0 if better else self.waited + 1
        if better:
            self.value = value
        return better

    def never_measured(self, run: Run) -> str | None:
        """A note, once, that nothing has measured the metric so far; None if something has."""
        if not self.wanted or self._compared_at >= 0 or self.value is not None or self._warned:
            return None
        self._warned = True
        seen = ", ".join(run.scalars) or "nothing"
        return (
            f"best_metric = {self._s.best_metric!r} has not been measured by step {run.step}, so "
            f"no checkpoint is the best one. Measured: {seen}."
        )

    def summary(self) -> str:
        """The text that follows the checkpoint's name in the file `best_checkpoint`."""
        return f"{self._s.best_metric} {self.value!r}"
