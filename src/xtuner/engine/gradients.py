"""The gradients of one optimizer step: every micro-batch forward and backward, summed over all
processes, unscaled and clipped.

In float16 the loss is scaled, and a step whose gradients overflow is computed again with half the
scale (see `loss_scaler`). The random state of every micro-step is a function of (seed, step,
micro-step, rank), so a resumed run draws what the straight run drew, and so does a step that is
computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from xtuner.engine.checked_loss import checked_loss
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.seeds import micro_seed
from xtuner.engine.signals import Interrupted
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.parallel.activity import in_call
from xtuner.types import Algorithm, Batch


@dataclass(frozen=True)
class Gradients:
    """What is known of the gradients of a step, the same on all processes.

    Attributes:
        loss: mean over all processes.
        norm: of the gradients, before clipping.
        metrics: means of the algorithm's metrics.
    """

    loss: float
    norm: float
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class StepGradients:
    """Computes the gradients of steps.

    Args:
        strategy: prepared.
        algorithm: computes summed losses.
        filler: gives a micro-batch that counts nothing; see `padded`.
        loss_scaler: of a run in float16, or a disabled one.
        seed: of the run.
        max_norm: gradients are clipped to it; None leaves them.
        stopped: whether this process was asked to stop.
    """

    def __init__(
        self,
        *,
        strategy: BaseStrategy,
        algorithm: Algorithm,
        filler: Callable[[], Batch],
        loss_scaler: LossScaler,
        seed: int,
        max_norm: float | None,
        stopped: Callable[[], bool],
    ) -> None:
        self.strategy, self.processes = strategy, strategy.processes
        self.algorithm, self.loss_scaler = algorithm, loss_scaler
        self._filler, self._seed, self._max_norm = filler, seed, max_norm
        self._stopped = stopped

    def compute(self, group: list[Batch], *, divisor: float, step: int) -> Gradients:
        """Leave the clipped gradients of optimizer step `step` with the strategy.

        All processes see the same sums, so they lower the scale of the loss together.

        Args:
            group: micro-batches of this process.
            divisor: of the losses, counted over all processes.
            step: optimizer steps done.

        Raises:
            Interrupted: a process that is alone was asked to stop.
        """
        scaler, strategy = self.loss_scaler, self.strategy
        while True:
            strategy.zero_grad()
            loss, metrics = self._accumulate(group, max(divisor, 1.0), step)
            strategy.reduce_gradients()
            if scaler.enabled:
                strategy.unscale(scaler.inverse)
            norm = strategy.clip_gradients(self._max_norm)
            overflow = float(not math.isfinite(norm))
            loss, *metrics = self.processes.of_rows([loss, *metrics])
            loss, overflows, *values = self.processes.sum([loss, overflow, *metrics])
            if not overflows or not math.isfinite(loss) or not scaler.lower():
                named = dict(zip(self.algorithm.metrics, values, strict=True))
                return Gradients(loss, norm, named)

    def _accumulate(
        self, group: list[Batch], divisor: float, step: int
    ) -> tuple[float, list[float]]:
        """Backpropagate every micro-batch; return this process's share of the mean loss and of the
        means of the algorithm's metrics."""
        total: Tensor | float = 0.0
        metrics: list[Tensor | float] = [0.0] * len(self.algorithm.metrics)
        batches = self.padded(group)
        for index, batch in enumerate(batches):
            if self.processes.world_size == 1 and self._stopped():
                self.strategy.zero_grad()
                raise Interrupted
            torch.manual_seed(micro_seed(self._seed, step, index, self.processes.rank))
            counts, last = index < len(group), index == len(batches) - 1
            together = in_call("a forward and backward pass") if self.strategy.lockstep else None
            with together or nullcontext():
                output = checked_loss(
                    self.algorithm, self.strategy.model, batch.to(self.processes.device)
                )
                loss = output.loss / divisor if counts else output.loss * 0.0
                self.strategy.backward(self.loss_scaler.scaled(loss), last=last)
            if not counts:
                continue
            total = total + loss.detach()
            for number, name in enumerate(self.algorithm.metrics):
                metrics[number] = metrics[number] + output.metrics[name].detach()
        return float(total), [float(value) / divisor for value in metrics]

    def padded(self, batches: list[Batch]) -> list[Batch]:
        """`batches`, filled up so that all processes have equally many where a backward pass takes
        all of them; what is added must count nothing."""
        if not self.strategy.lockstep:
            return batches
        missing = int(self.processes.max(len(batches))) - len(batches)
        if not missing:
            return batches
        return [*batches, *[batches[0] if batches else self._filler()] * missing]

    @torch.no_grad()
    def rows_not_finite(self, group: list[Batch]) -> list[str]:
        """The rows of this process whose own loss is not finite."""
        singles = [sample for batch in group for sample in batch.split()]
        bad = []
        for index, sample in enumerate(self.padded(singles)):
            output = checked_loss(
                self.algorithm, self.strategy.model, sample.to(self.processes.device)
            )
            if index < len(singles) and sample.rows and not torch.isfinite(output.loss):
                bad.append(str(sample.rows[0]))
        return bad
