"""Draws the loss curve at the end: ``loss_curve.png``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from xtuner.engine.hooks.base import BaseHook, Run

WIDTH = 50
"""The running mean spans about a fiftieth of the run in both directions."""

Points = Sequence[tuple[float, float]]
"""Pairs of step and loss."""


class Hook(BaseHook):
    """Collects each step's loss and draws the curve, with a running mean, when the run ends or
    stops."""

    order = 70
    records = True

    def __init__(self) -> None:
        self._losses: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []
        self._answers: list[int] = []
        self._file: Path | None = None

    def on_start(self, run: Run) -> None:
        """Set the path of the image."""
        self._file = run.log_dir / "loss_curve.png"
        self._keep(run)

    def on_step(self, run: Run) -> None:
        """Keep the loss."""
        self._losses.append((run.step, run.scalars["loss"]))
        self._keep(run)

    def on_end(self, run: Run) -> None:
        """Keep a validation loss measured after the last step."""
        self._keep(run)

    def close(self) -> None:
        """Draw the curve if there are values."""
        if self._file is not None and len(self._losses) > 1:
            draw(self._file, self._losses, self._validation, self._answers)

    def _keep(self, run: Run) -> None:
        """Record the validation loss, and whether questions were asked, at this step."""
        if "val_loss" in run.scalars and run.step not in dict(self._validation):
            self._validation.append((run.step, run.scalars["val_loss"]))
        due = run.counter.due(run.step, run.settings.evaluation_freq)
        asked = due or run.step in (0, run.total_steps)
        if asked and run.settings.evaluation_inputs and run.step not in self._answers:
            self._answers.append(run.step)


def running_mean(losses: Points) -> list[float]:
    """The mean around each step, with weights that decay exponentially to both sides.

    A mean over past steps alone lags behind a falling loss.
    """
    values = [loss for _, loss in losses]
    kept = math.exp(-1 / max(1.0, len(values) / WIDTH))

    def past(numbers: Sequence[float]) -> list[float]:
        sums = itertools.accumulate(numbers, lambda total, number: kept * total + number)
        return [total - number for total, number in zip(sums, numbers, strict=True)]

    def around(numbers: list[float]) -> list[float]:
        ahead = past(numbers[::-1])[::-1]
        return [sum(three) for three in zip(past(numbers), numbers, ahead, strict=True)]

    weights = around([1.0] * len(values))
    return [total / weight for total, weight in zip(around(values), weights, strict=True)]


def draw(file: Path, losses: Points, validation: Points, answers: Sequence[int] = ()) -> None:
    """Draw (step, loss) pairs as a PNG.

    Args:
        losses: The loss of each step; the thick line is its `running_mean`.
        validation: The validation loss at the steps at which it was measured.
        answers: The steps at which questions were asked.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color="#9bb7d4", linewidth=1, label="loss of each step")
    axes.plot(steps, running_mean(losses), color="#1f4e79", linewidth=2, label="running mean")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color="#c0504d", marker="o", label="validation loss"
        )
    if answers:
        height = axes.get_xaxis_transform()  # 0 is the bottom of the axes, 1 the top
        axes.plot(answers, [0.0] * len(answers), "^", color="#4f8f4f", markersize=7,
                  transform=height, clip_on=False, label="sample answers")  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    highest = max([*values, *(loss for _, loss in validation)])
    axes.set_ylim(0, 1.08 * highest if 0 < highest < float("inf") else None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
