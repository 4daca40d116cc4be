"""The gradients of one optimizer step: forward and backward passes of all micro-batches, summed
over all processes, unscaled and clipped.

In float16 the loss is scaled, and a step whose gradients overflow is recomputed with half the scale
(see `loss_scaler`). The random state of every micro-step is a function of (seed, step, micro-step,
rank), so a resumed run and a recomputed step draw the same random numbers as an uninterrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xtuner.device.heap import trim_if_grown
from xtuner.engine.checked_loss import checked_loss
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.seeds import micro_seed
from xtuner.engine.signals import Interrupted
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.parallel import activity
from xtuner.types import Algorithm, Batch, LossOutput


@dataclass(frozen=True)
class Gradients:
    """The loss, gradient norm and metrics of a step, the same on all processes.

    Attributes:
        loss: Mean over all processes.
        norm: Gradient norm before clipping.
        metrics: Means of the algorithm's metrics.
    """

    loss: float
    norm: float
    metrics: dict[str, float]

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite, so that the step can be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class StepGradients:
    """Computes the gradients of steps.

    Args:
        strategy: A prepared strategy.
        algorithm: Computes summed losses.
        filler: Returns a micro-batch with zero weight; see `padded`.
        loss_scaler: The loss scaler; disabled unless the run uses float16.
        seed: The run's seed.
        max_norm: Maximum gradient norm; None disables clipping.
        stopped: Whether this process was asked to stop.
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
        """Compute the clipped gradients of optimizer step `step`; the strategy holds them. All
        processes see the same sums, so they lower the loss scale together.

        Args:
            group: Micro-batches of this process.
            divisor: The losses' divisor, counted over all processes.
            step: Optimizer steps completed.

        Raises:
            Interrupted: A single-process run was asked to stop.
        """
        scaler, strategy = self.loss_scaler, self.strategy
        while True:
            strategy.zero_grad()
            loss, metrics = self._accumulate(group, divisor or 1.0, step)
            with activity.in_call("the sum of gradients"):
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
        mean metrics."""
        total: Tensor | float = 0.0
        metrics: list[Tensor | float] = [0.0] * len(self.algorithm.metrics)
        batches = self.padded(group)
        for index, batch in enumerate(batches):
            if self.processes.world_size == 1 and self._stopped():
                self.strategy.zero_grad()
                raise Interrupted
            torch.manual_seed(micro_seed(self._seed, step, index, self.processes.rank))
            counts, last = index < len(group), index == len(batches) - 1
            activity.current.pace.begin(batch.num_tokens)
            output = self._loss(batch)
            loss = output.loss / divisor if counts else output.loss * 0.0
            self.strategy.backward(self.loss_scaler.scaled(loss), last=last)
            activity.current.progress()
            trim_if_grown()
            if counts:
                total = total + loss.detach()
                values = [output.metrics[name].detach() for name in self.algorithm.metrics]
                metrics = [sum(pair) for pair in zip(metrics, values, strict=True)]
        return float(total), [float(value) / divisor for value in metrics]

    def _loss(self, batch: Batch) -> LossOutput:
        device = self.processes.device
        return checked_loss(self.algorithm, self.strategy.model, batch.to(device))

    def padded(self, batches: list[Batch]) -> list[Batch]:
        """`batches`, padded to the same number on all processes if a backward pass is collective;
        the padding must have zero weight."""
        if not self.strategy.lockstep:
            return batches
        missing = int(self.processes.max(len(batches))) - len(batches)
        if not missing:
            return batches
        return [*batches, *[batches[0] if batches else self._filler()] * missing]

    @torch.no_grad()
    def rows_not_finite(self, group: list[Batch]) -> list[str]:
        """The rows of this process whose own loss is non-finite."""
        singles = [sample for batch in group for sample in batch.split()]
        bad = []
        for index, sample in enumerate(self.padded(singles)):
            activity.current.progress()
            output = self._loss(sample)
            if index < len(singles) and sample.rows and not torch.isfinite(output.loss):
                bad.append(str(sample.rows[0]))
        return bad
