"""At the end, the loss as an image: ``loss_curve.png``."""

from __future__ import annotations

from pathlib import Path

from xtuner.engine.hooks.base import BaseHook, Run


class Hook(BaseHook):
    """Keeps each step's loss and draws them, with a running mean, when the run ends or stops."""

    order = 70
    records = True

    def __init__(self) -> None:
        self._losses: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []
        self._file: Path | None = None

    def on_start(self, run: Run) -> None:
        """Note where the image goes."""
        self._file = run.log_dir / "loss_curve.png"
        self.on_end(run)

    def on_step(self, run: Run) -> None:
        """Keep the loss."""
        self._losses.append((run.step, run.scalars["loss"]))
        if "val_loss" in run.scalars:
            self._validation.append((run.step, run.scalars["val_loss"]))

    def on_end(self, run: Run) -> None:
        """Keep a validation loss measured after the last step (or, from `on_start`, before the
        first)."""
        if "val_loss" in run.scalars:
            self._validation.append((run.step, run.scalars["val_loss"]))

    def close(self) -> None:
        """Draw, if there is anything to draw."""
        if self._file is not None and len(self._losses) > 1:
            draw(self._file, self._losses, self._validation)


def draw(file: Path, losses: list[tuple[int, float]], validation: list[tuple[int, float]]) -> None:
    """Draw (step, loss) pairs as a PNG; the thick line is an exponential running mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, values = zip(*losses, strict=True)
    smooth, mean = [], values[0]
    for value in values:
        mean = 0.9 * mean + 0.1 * value
        smooth.append(mean)
    axes.plot(steps, values, color="#9bb7d4", linewidth=1, label="loss of each step")
    axes.plot(steps, smooth, color="#1f4e79", linewidth=2, label="running mean")
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color="#c0504d", marker="o", label="validation loss"
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per trained token")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)
