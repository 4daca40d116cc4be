"""The result of a training run, part of the public API. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run.

    Attributes:
        work_dir: Folder of the checkpoints and logs.
        checkpoint: The newest checkpoint; None if the run stopped before the first step.
        best: With `keep_best`, the checkpoint with the best `best_metric`; otherwise None.
        step: Optimizer steps completed.
        metrics: The numbers of the last step, such as `loss`, `lr` and `tokens_per_second`, and
            `val_loss` if there is a validation split.
    """

    work_dir: Path
    checkpoint: Path | None
    step: int
    metrics: dict[str, float]
    best: Path | None = None
