"""Writes every step's numbers to ``scalars.jsonl`` and to a readable log file."""

from __future__ import annotations

import json
import time
from io import TextIOWrapper

from xtuner.engine.hooks.base import BaseHook, Run, numbers

SHOWN = ("lr", "loss", "val_loss", "grad_norm", "tokens_per_second", "memory_mb")


class Hook(BaseHook):
    """Writes ``scalars.jsonl`` at every step and ``<time>.log`` every `logging_steps`."""

    order = 30
    records = True

    def __init__(self) -> None:
        self._files: list[TextIOWrapper] = []

    def on_start(self, run: Run) -> None:
        """Open the two files."""
        for name in ("scalars.jsonl", f"{run.log_dir.name}.log"):
            self._files.append((run.log_dir / name).open("a", encoding="utf-8"))

        self._write_validation(run)

    def on_step(self, run: Run) -> None:
        """Write and flush, so that no numbers are lost if the run is killed."""
        scalars, log = self._files
        values = {"step": run.step, "epoch": round(run.epoch, 6), **run.scalars}
        scalars.write(json.dumps(values) + "\n")
        scalars.flush()
        due = run.counter.due(run.step, run.settings.logging_steps)
        if due or run.step == run.total_steps:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(
                f"{now}  step {run.step}/{run.total_steps}  epoch {run.epoch:.2f}  "
                f"{numbers(run.scalars, SHOWN)}\n"
            )
            log.flush()

    def on_end(self, run: Run) -> None:
        """Write the validation loss of the finished model."""
        self._write_validation(run)

    def _write_validation(self, run: Run) -> None:
        """Write a validation loss that was measured before the first or after the last step."""
        if "val_loss" in run.scalars:
            line = {
                "step": run.step,
                "epoch": round(run.epoch, 6),
                "val_loss": run.scalars["val_loss"],
            }
            self._files[0].write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
