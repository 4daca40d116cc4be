"""The training loop, the only one: every algorithm, tuning and kind of device goes through
`Trainer.fit`.

One optimizer step takes one group of micro-batches. With N the algorithm's count (for most,
supervised tokens) in the group over all processes, each micro-batch's *summed* loss is divided by N
and backpropagated, gradients are summed over the processes, clipped and applied (in float16 the
loss is scaled, and a step whose gradients overflow is repeated with half the scale: see
`loss_scaler`). So 1 batch of 8, 8 batches of 1 and uneven last groups give one gradient. The random
state of every micro-step is a function of (seed, step, micro-step, rank), so a resumed run draws
what the straight run drew.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.device.host import memory_mb
from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine import faults
from xtuner.engine.checked_loss import checked_loss
from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.flat import FlatOptimizer
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.signals import StopRequest
from xtuner.errors import DataError, LaunchError, TrainingError, XTunerError
from xtuner.parallel.processes import Processes
from xtuner.types import Algorithm, Batch


class Groups(Protocol):
    """What the trainer needs of a data loader."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        ...

    def groups(self, start_step: int, stop_step: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each optimizer step."""
        ...


class Interrupted(Exception):
    """The run was asked to stop; `can_resume` tells whether there is a checkpoint to go on from."""

    def __init__(self, message: str = "", *, can_resume: bool = False) -> None:
        super().__init__(message)
        self.can_resume = can_resume


class Trainer:
    """Runs optimizer steps from `run.step` to `run.total_steps`.

    Args:
        model: given to the algorithm; its parameters with `requires_grad` are trained.
        algorithm: collates and computes summed losses.
        loader: gives each step's micro-batches.
        optimizer: made for the parameters of `model`.
        processes: this process and the others.
        run: the state that hooks see.
        hooks: of the main process.
        save: writes a checkpoint of the current step.
        memory_advice: what to change when memory runs out.
        loss_scaler: of a run in float16.
    """

    def __init__(
        self,
        *,
        model: Any,
        algorithm: Algorithm,
        loader: Groups,
        optimizer: torch.optim.Optimizer | FlatOptimizer,
        processes: Processes,
        run: Run,
        hooks: Sequence[BaseHook],
        save: Callable[[Run], None],
        memory_advice: Callable[[], str] = lambda: "",
        loss_scaler: LossScaler | None = None,
    ):
        self.model, self.algorithm, self.loader = model, algorithm, loader
        self.optimizer, self.processes, self.run = optimizer, processes, run
        self.hooks, self.save = sorted(hooks, key=lambda hook: hook.order), save
        self.parameters = optim.trainable(model)
        self.settings: Settings = run.settings
        self.memory_advice = memory_advice
        self.loss_scaler = loss_scaler or LossScaler(enabled=False)
        self._saved_at = -1
        self._stop = StopRequest()
        self._weights_are_whole = True

    def fit(self) -> None:
        """Train to the end, or to an interruption.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM; the last finished step is saved.
            TrainingError: a loss or gradient is not finite, or memory ran out; the last good step
                is saved, unless memory ran out in one of several processes.
            DataError: a row of the next step cannot be read any more; the last good step is saved.
        """
        run = self.run
        with ExitStack() as stack:
            for hook in self.hooks:
                stack.callback(self._close, hook)
            stack.enter_context(self._stop.on_signals())
            self._call("on_start")
            self.model.train()
            groups = self.loader.groups(run.step, run.total_steps)
            while True:
                started = time.perf_counter()
                group, fault = self._next(groups)
                if group is None:
                    break
                try:
                    self._step(group, started, fault)
                except Interrupted:
                    self._save_once()
                    if run.step == 0:
                        raise Interrupted("Stopped before the first step.") from None
                    message = f"Stopped at step {run.step}; it is saved."
                    raise Interrupted(message, can_resume=True) from None
                except DataError as error:
                    raise self._without_data(error) from fault
                except TrainingError:
                    self._save_once()
                    raise
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
                    raise self._out_of_memory(group) from error
                try:
                    self._call("on_step")
                except DataError as error:  # of a row that the loss is measured on
                    raise self._without_data(error) from error
                if run.step == run.total_steps:
                    self._save_once()
                elif due := run.counter.due(run.step, self.settings.save_steps):
                    self._save_once(due)
            self._call("on_end")

    def _next(self, groups: Iterator[list[Batch]]) -> tuple[list[Batch] | None, XTunerError | None]:
        """The next group, None at the end; an empty one and why, where it cannot be read."""
        try:
            return next(groups, None), None
        except XTunerError as error:
            return [], error
        except Exception:
            if self.processes.world_size == 1:
                self._save_once()
            raise

    def _without_data(self, error: DataError) -> DataError:
        """Save the last whole step; say what is wrong with the data and how to go on."""
        self._save_once()
        saved = max(self._saved_at, self.run.start_step)
        hint = f"step {saved} is saved, go on with --resume" if saved > 0 else "then begin anew"
        return DataError(f"{error}; {hint}")

    def _step(self, group: list[Batch], started: float, fault: XTunerError | None = None) -> None:
        """One optimizer step; on an exception the weights are those of the step before.

        Args:
            group: micro-batches of this process.
            started: when the data were asked for.
            fault: why this process has no data; all processes then stop together.
        """
        data_seconds = time.perf_counter() - started
        run, settings = self.run, self.settings
        counts = [float(sum(map(count, group))) for count in self._counts()]
        signs = [float(self._stop.made), float(fault is not None)]
        divisor, supervised, tokens, stops, failed = self.processes.sum([*counts, *signs])
        if failed:
            raise DataError("; ".join(self.processes.gather([str(fault)] if fault else [])))
        if stops:
            raise Interrupted
        lr = optim.learning_rate(
            run.step,
            total_steps=run.total_steps,
            peak=settings.lr,
            warmup_ratio=settings.warmup_ratio,
            schedule=settings.lr_schedule,
            end_ratio=settings.lr_end_ratio,
            warmup_steps=run.counter.steps_of(settings.warmup_steps),
        )
        optim.set_learning_rate(self.optimizer, lr)
        loss, norm, metrics = self._gradients(group, divisor)
        if not math.isfinite(norm) or not math.isfinite(loss):
            self.optimizer.zero_grad(set_to_none=True)
            raise TrainingError(self._not_finite(group, loss, norm))
        self._weights_are_whole = False
        self.optimizer.step()
        self._weights_are_whole = True
        scale = self.loss_scaler.scale
        self.loss_scaler.step_taken()
        run.step += 1
        run.epoch = run.step / self.loader.steps_per_epoch
        seconds = time.perf_counter() - started
        run.scalars = {
            "lr": lr,
            "loss": loss,
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens": supervised,
            "seconds": seconds,
            "data_seconds": data_seconds,
            "memory_mb": memory_mb(self.processes.device),
            **metrics,
        }
        if self.loss_scaler.enabled:
            run.scalars["loss_scale"] = scale

    def _gradients(
        self, group: list[Batch], divisor: float
    ) -> tuple[float, float, dict[str, float]]:
        """Compute the gradients of a step and clip them; return the mean loss over all processes,
        the norm before clipping, and the means of the algorithm's metrics.

        All processes see the same sums, so they lower the scale of the loss together.
        """
        scaler = self.loss_scaler
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            loss, metrics = self._accumulate(group, divisor)
            gather = self.optimizer.gather if isinstance(self.optimizer, FlatOptimizer) else None
            self.processes.sum_gradients(self.parameters, gather=gather)
            scaler.unscale(self.parameters)
            norm = optim.clip_gradients(self.parameters, self.settings.max_norm)
            overflow = float(not math.isfinite(norm))
            loss, overflows, *values = self.processes.sum([loss, overflow, *metrics])
            if not overflows or not math.isfinite(loss) or not scaler.lower():
                return loss, norm, dict(zip(self.algorithm.metrics, values, strict=True))

    def _counts(self) -> tuple[Callable[[Batch], float], ...]:
        """What is counted of each micro-batch: its share of the divisor, supervised tokens,
        tokens."""
        return (self.algorithm.count, lambda b: b.num_supervised, lambda b: b.num_tokens)

    def _accumulate(self, group: list[Batch], divisor: float) -> tuple[float, list[float]]:
        """Backpropagate every micro-batch; return this process's share of the mean loss and of the
        means of the algorithm's metrics."""
        total: Tensor | float = 0.0
        metrics: list[Tensor | float] = [0.0] * len(self.algorithm.metrics)
        for index, batch in enumerate(group):
            if self._stop.made and self.processes.world_size == 1:
                self.optimizer.zero_grad(set_to_none=True)
                raise Interrupted
            torch.manual_seed(
                _micro_seed(self.settings.seed, self.run.step, index, self.processes.rank)
            )
            output = checked_loss(self.algorithm, self.model, batch.to(self.processes.device))
            loss = output.loss / max(divisor, 1.0)
            if loss.requires_grad:  # text does not reach a projector that alone is trained
                self.loss_scaler.backward(loss)
            total = total + loss.detach()
            for number, name in enumerate(self.algorithm.metrics):
                metrics[number] = metrics[number] + output.metrics[name].detach()
        return float(total), [float(value) / max(divisor, 1.0) for value in metrics]

    def _out_of_memory(self, group: list[Batch]) -> TrainingError:
        """Save the last whole step and say what to change.

        One of several processes saves nothing: the others are in the middle of the step and would
        not come. It ends, and the launcher ends them.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        alone, note = self.processes.world_size == 1, ""
        if alone and self._weights_are_whole:
            try:
                self._save_once()
            except LaunchError as error:
                note = f"The last step is lost: {error} "
        elif not alone:
            note = f"Process {self.processes.rank} ran out, and the run ends without a save. "
        text = faults.out_of_memory(
            self.run.step + 1,
            tokens=max(batch.num_tokens for batch in group),
            note=note,
            saved=max(self._saved_at, self.run.start_step) > 0,
            advice=self.memory_advice(),
        )
        return TrainingError(text)

    def _not_finite(self, group: list[Batch], loss: float, norm: float) -> str:
        """Name the rows, of any process, whose own loss is not finite; or else all of the step."""
        singles = [sample for batch in group for sample in batch.split()]
        with torch.no_grad():
            bad = [
                str(sample.rows[0])
                for sample in singles
                if sample.rows
                and not torch.isfinite(
                    self.algorithm.loss(self.model, sample.to(self.processes.device)).loss
                )
            ]
        bad = self.processes.gather(bad)
        rows = bad or self.processes.gather([str(r) for batch in group for r in batch.rows])
        return faults.not_finite(
            self.run.step,
            loss=loss,
            norm=norm,
            rows=rows,
            certain=bool(bad),
            float16=self.loss_scaler.enabled,
        )

    def _close(self, hook: BaseHook) -> None:
        """Close a hook; a fault in it must hide neither the end of the run nor its error."""
        try:
            hook.close()
        except Exception as error:
            self.run.console.print(
                f"Note: {type(hook).__module__} could not finish: {error}", markup=False
            )

    def _save_once(self, count: int | None = None) -> None:
        """Save the current step, named by `count`, or by what is done."""
        self.run.count = self.run.counter.done(self.run.step) if count is None else count
        if self._saved_at != self.run.step and self.run.step != self.run.start_step:
            self.save(self.run)
            self._saved_at = self.run.step

    def _call(self, event: str) -> None:
        if self.processes.is_main:
            for hook in self.hooks:
                getattr(hook, event)(self.run)
        self.processes.wait()
        self.model.train()


def _micro_seed(seed: int, step: int, index: int, rank: int) -> int:
    """A seed of its own for every micro-step: splitmix64 over the four counters."""
    state = seed
    for number in (step, index, rank):
        state = (state * 0x9E3779B97F4A7C15 + number + 1) & (2**64 - 1)
        state ^= state >> 30
        state = (state * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state ^= state >> 27
    return state
