"""What a training run leaves behind. Imports no torch: the public API shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """What a training run left behind.

    Attributes:
        work_dir: folder of the checkpoints and logs.
        checkpoint: the newest checkpoint; None if the run stopped before the first step.
        step: optimizer steps done.
        metrics: the numbers of the last step, such as `loss`, `lr` and `tokens_per_second`, and
            `val_loss` where there is a validation split.
    """

    work_dir: Path
    checkpoint: Path | None
    step: int
    metrics: dict[str, float]
