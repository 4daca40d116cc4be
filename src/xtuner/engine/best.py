"""The best checkpoint of a run by a metric, and early stopping when it no longer improves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.hooks.base import Run
from xtuner.errors import count
from xtuner.parallel.processes import Processes


class BestMetric:
    """Tracks the best value of `best_metric`. Its state is part of every checkpoint, so that a
    resumed run stops where the uninterrupted one does.

    Args:
        store: Keeps the best checkpoint, and the file that names it.
        processes: The process group; all ranks make the same decision.

    Attributes:
        value: The best value so far; None before the first measurement.
        waited: Measurements since the best one.
    """

    def __init__(self, settings: Settings, store: CheckpointStore, processes: Processes) -> None:
        self._s, self._store, self._processes = settings, store, processes
        self.value: float | None = None
        self.waited = 0
        self._name = ""  # of the best checkpoint
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

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {
            **self._metric,
            "value": self.value,
            "name": self._name,
            "waited": self.waited,
        }

    def load_state_dict(self, state: Mapping[str, Any], *, source: Path) -> None:
        """Restore the state of a run that is resumed, and let the file name its best checkpoint; a
        collective call.

        Args:
            state: What `state_dict` returned; empty for a checkpoint that lacks it. That of another
                metric is ignored.
            source: The checkpoint.
        """
        if not self.wanted or (state and any(state[k] != v for k, v in self._metric.items())):
            return
        if state:
            value, self._name = state["value"], str(state["name"])
            self.value, self.waited = value if value is None else float(value), int(state["waited"])
        if source.resolve().parent != self._store.work_dir.resolve():
            return
        # The others may see the file after the main process has rewritten it.
        entries = [self._store.best_entry()] if self._processes.is_main else []
        named, metric, value = self._processes.gather(entries)[0]
        if metric == self._s.best_metric and (named == source.name or not state):
            # measured after the last step, when its checkpoint had been written
            self.value, self._name, self.waited = value, named, 0
        elif state and named != self._name and self._s.keep_best and self._processes.is_main:
            # killed between the checkpoint and the file, or resumed from an earlier checkpoint,
            # after which another one was the best, and this one may be deleted
            if any(path.name == self._name for path in self._store.all()):
                self._store.mark_best(self._name, self.summary())
            else:
                self._store.mark_none()

    @property
    def _metric(self) -> dict[str, str]:
        return {"metric": self._s.best_metric, "goal": self._s.best_metric_goal}

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
            self.value, self._name = value, f"iter_{run.counter.done(run.step)}"
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

    def reason(self) -> str:
        """Why the run stops early."""
        if self.value is None:
            return f"{self._s.best_metric} was not a number in {count(self.waited, 'measurement')}"
        last = "measurement" if self.waited == 1 else count(self.waited, "measurement")
        return (
            f"{self._s.best_metric} was best at {self.value:.4g} and has not improved in the last "
            f"{last}"
        )
