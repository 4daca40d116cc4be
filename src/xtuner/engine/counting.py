"""Counts a run's steps in the unit of the setting `steps_are`: optimizer steps, or micro-batches.

XTuner 0.x counts the micro-batches of one process. With accumulative_counts = 16 its checkpoint
iter_300 holds the weights after 18 optimizer steps (288 micro-batches): the gradients of the other
12 are not applied yet. So a multiple of an interval belongs to the last optimizer step completed by
then.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Literal

from xtuner.config.schema import Settings
from xtuner.data.loader import Loader
from xtuner.errors import count

Unit = Literal["optimizer_steps", "micro_batches"]


@dataclass(frozen=True)
class Counter:
    """Counts for one run.

    Attributes:
        unit: The setting `steps_are`.
        steps_per_epoch: Optimizer steps per epoch; the last one may have fewer micro-batches.
        micro_batches_per_epoch: Micro-batches of one process per epoch.
        accumulative_counts: Micro-batches in a full step.
    """

    unit: Unit = "optimizer_steps"
    steps_per_epoch: int = 1
    micro_batches_per_epoch: int = 1
    accumulative_counts: int = 1

    def done(self, step: int) -> int:
        """The count after `step` optimizer steps."""
        if self.unit == "optimizer_steps":
            return step
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.micro_batches_per_epoch + rest * self.accumulative_counts

    def due(self, step: int, every: int) -> int | None:
        """The multiple of `every` that belongs to optimizer step `step`, or None. If there are
        several (the interval is shorter than a step), the last one.
        """
        if step < 1:
            return None
        last = (self.done(step + 1) - 1) // every * every
        return last if last >= self.done(step) and last > 0 else None

    def steps_for(self, count: int, *, most: int) -> int:
        """The fewest optimizer steps that reach `count`, at most `most`."""
        return bisect.bisect_left(range(most), count, key=self.done)

    def steps_of(self, count: int | None) -> int | None:
        """About how many optimizer steps `count` takes; None for None."""
        if count is None or self.unit == "optimizer_steps":
            return count
        return -(-count // self.accumulative_counts)

    def of_run(self, every: int, total_steps: int) -> list[tuple[int, int]]:
        """The count and the optimizer step of the run's first checkpoints and of its end."""
        end = self.done(total_steps)
        steps: dict[int, int] = {}
        for multiple in range(every, end, every):
            step = bisect.bisect_right(range(total_steps + 1), multiple, key=self.done) - 1
            if step > 0:
                steps[step] = multiple
            if len(steps) > _SHOWN:
                break
        return [(count, step) for step, count in steps.items()] + [(end, total_steps)]

    def words(self, number: int) -> str:
        """`number` with the words for what is counted."""
        if self.unit == "optimizer_steps":
            return count(number, "step")
        return count(number, "micro-batch", "micro-batches")


_SHOWN = 4


def counting_of(s: Settings, loader: Loader) -> tuple[Counter, int]:
    """The run's counter and the optimizer step at which it ends."""
    if s.accumulative_counts == "auto" or s.max_epochs == "auto":
        raise ValueError("the settings are not resolved: see config.recipe")
    counter = Counter(
        unit=s.steps_are,
        steps_per_epoch=loader.steps_per_epoch,
        micro_batches_per_epoch=loader.micro_batches_per_epoch,
        accumulative_counts=s.accumulative_counts,
    )
    total = loader.steps_per_epoch * s.max_epochs
    return counter, counter.steps_for(s.max_steps, most=total) if s.max_steps else total
