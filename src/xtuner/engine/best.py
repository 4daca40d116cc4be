"""The best checkpoint of a run by a metric, and when to stop for want of a better one."""

from __future__ import annotations

import math
from pathlib import Path

from xtuner.config.schema import Settings
from xtuner.engine.checkpoint import BEST_FILE
from xtuner.engine.hooks.base import Run
from xtuner.parallel.processes import Processes


class BestMetric:
    """Compares `best_metric` whenever it is measured.

    Args:
        settings: of the run.
        work_dir: holds the file `best_checkpoint`, from which a resumed run takes the best value.
        processes: this process and the others, which all decide alike.

    Attributes:
        value: the best so far; None before the first.
        waited: measurements since then.
    """

    def __init__(self, settings: Settings, work_dir: Path, processes: Processes) -> None:
        self._s, self._file, self._processes = settings, work_dir / BEST_FILE, processes
        self.value: float | None = None
        self.waited = 0
        self._compared_at = -1

    @property
    def wanted(self) -> bool:
        """Whether the settings ask for anything."""
        return self._s.keep_best or self._s.early_stopping_patience is not None

    @property
    def exhausted(self) -> bool:
        """Whether the run is to end."""
        patience = self._s.early_stopping_patience
        return patience is not None and self.waited >= patience

    def resume(self) -> None:
        """Take the best value of the run that goes on."""
        told = self._file.read_text(encoding="utf-8").split() if self._file.is_file() else []
        if len(told) == 3 and told[1] == self._s.best_metric:
            self.value = float(told[2])

    def improves(self, run: Run) -> bool:
        """Compare the metric, if it was measured at this step; whether it is the best so far. A
        collective call."""
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

    def told(self) -> str:
        """The contents of the file `best_checkpoint` behind the name of the checkpoint."""
        return f"{self._s.best_metric} {self.value!r}"
