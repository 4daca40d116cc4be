"""Training progress: a bar, or plain lines if the output is not a terminal."""

from __future__ import annotations

import importlib.util
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from xtuner.engine.hooks.base import BaseHook, Run, numbers

SHOWN = ("loss", "lr", "tokens_per_second")
IN_BAR = ("loss", "tokens_per_second")  # the bar must fit into 80 columns
SECONDS_BETWEEN_LINES = 10.0


class Hook(BaseHook):
    """A progress bar with loss, learning rate, speed and remaining time.

    It covers the steps only: it is drawn after the other hooks have started, and stays on the
    screen after the last step.
    """

    order = 99

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line = 0.0

    def on_start(self, run: Run) -> None:
        """Draw the bar."""
        if not _can_draw(run.console):
            return
        self._bar = Progress(
            TextColumn("Training"),
            BarColumn(bar_width=12),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=run.console,
        )
        self._task = self._bar.add_task("", total=run.total_steps, completed=run.step, shown="")
        self._bar.start()

    def on_step(self, run: Run) -> None:
        """Advance the bar, or print a line from time to time."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=run.step, shown=_words(run, IN_BAR))
            if run.step == run.total_steps:
                self.close()
        elif (
            run.step in (1, run.total_steps)
            or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES
        ):
            self._last_line = time.monotonic()
            run.console.print(
                f"step {run.step}/{run.total_steps}  epoch {run.epoch:.2f}  {_words(run, SHOWN)}"
            )

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _can_draw(console: Console) -> bool:
    """Whether a bar can be drawn: in a terminal, or in a notebook with widgets."""
    in_notebook = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal or in_notebook


def _words(run: Run, keys: tuple[str, ...]) -> str:
    return numbers(run.scalars, keys).replace("tokens_per_second", "tokens/s")
