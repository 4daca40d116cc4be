"""Writes TensorBoard events next to the other logs; skipped with a note if tensorboard is
missing."""

from __future__ import annotations

import importlib.util
from typing import Any

from xtuner.engine.hooks.base import BaseHook, Run


class Hook(BaseHook):
    """Writes every step's numbers under ``train/``."""

    order = 60
    records = True

    def __init__(self) -> None:
        self._writer: Any = None

    def wanted(self, run: Run) -> bool:
        """Whether settings enable it and the package is installed."""
        if not run.settings.tensorboard and "tensorboard" not in run.settings.report_to:
            return False
        if importlib.util.find_spec("tensorboard") is None:
            run.console.print(
                "TensorBoard is not installed, so no events are written: "
                "pip install 'xtuner[tensorboard]'"
            )
            return False
        return True

    def on_start(self, run: Run) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.log_dir / "tensorboard"))

        self.on_step(run)

    def on_end(self, run: Run) -> None:
        """Write the validation loss of the finished model."""
        if "val_loss" in run.scalars:
            self._writer.add_scalar("train/val_loss", run.scalars["val_loss"], run.step)

    def on_step(self, run: Run) -> None:
        """Write the step's numbers."""
        for name, value in run.scalars.items():
            self._writer.add_scalar(f"train/{name}", value, run.step)

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
