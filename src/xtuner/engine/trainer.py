"""The only training loop: every algorithm, tuning method, strategy and device uses `Trainer.fit`.

One optimizer step consumes one group of micro-batches. Let N be the algorithm's count (usually
supervised tokens) in the group over all processes: each micro-batch's *summed* loss is divided by N
and backpropagated, gradients are summed over the processes, clipped and applied (`gradients`). So 1
batch of 8, 8 batches of 1 and uneven last groups give the same gradient. The strategy decides where
weights, gradients and optimizer state are.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from xtuner.data.loader import Loader
from xtuner.device.host import memory_mb
from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine import faults
from xtuner.engine.best import BestMetric
from xtuner.engine.checked_loss import checked_count
from xtuner.engine.gradients import Gradients, StepGradients
from xtuner.engine.hook_calls import HookCalls
from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.optimizer.optim import learning_rate
from xtuner.engine.signals import Interrupted, StopRequest
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.errors import ConfigError, DataError, LaunchError, TrainingError, XTunerError
from xtuner.parallel import activity
from xtuner.parallel.collective import collective_layers
from xtuner.types import Algorithm, Batch


class Trainer:
    """Runs optimizer steps from `run.step` to `run.total_steps`.

    Args:
        strategy: A prepared strategy; holds the model and the optimizer.
        algorithm: Collates samples and computes summed losses.
        loader: Yields each step's micro-batches.
        run: The state that hooks see.
        hooks: The hooks of this process.
        save: Writes a checkpoint of the current step; a collective call.
        memory_advice: What to change when memory runs out.
        loss_scaler: The loss scaler of a float16 run.
        best: Tracks the best checkpoint and decides on early stopping.
        mark_best: Marks the checkpoint that was just saved as the best.
    """

    def __init__(
        self,
        *,
        strategy: BaseStrategy,
        algorithm: Algorithm,
        loader: Loader,
        run: Run,
        hooks: Sequence[BaseHook],
        save: Callable[[Run], None],
        memory_advice: Callable[[], str] = lambda: "",
        loss_scaler: LossScaler | None = None,
        best: BestMetric | None = None,
        mark_best: Callable[[Run, str], None] = lambda run, summary: None,
    ):
        self.best, self.mark_best = best, mark_best
        self.strategy, self.processes = strategy, strategy.processes
        self.model: Any = strategy.model
        self.algorithm, self.loader, self.run, self.save = algorithm, loader, run, save
        self.hooks = HookCalls(hooks, run, self.processes)
        self.memory_advice = memory_advice
        self.loss_scaler = loss_scaler or LossScaler(enabled=False)
        self._saved_at = -1
        self._stop = StopRequest()
        self.gradients = StepGradients(
            strategy=strategy,
            algorithm=algorithm,
            filler=lambda: self.loader.filler(),
            loss_scaler=self.loss_scaler,
            seed=run.settings.seed,
            max_norm=run.settings.max_norm,
            stopped=lambda: self._stop.made,
        )
        self._weights_are_consistent = True
        self._noted_no_count = False

    def fit(self) -> None:
        """Train until the end or an interruption.

        Raises:
            Interrupted: After Ctrl-C or SIGTERM; the last completed step is saved.
            TrainingError: A loss or gradient is non-finite, or memory ran out; the last good step
                is saved, unless memory ran out on one of several processes.
            DataError: A row of the next step can no longer be read; the last good step is saved.
        """
        run = self.run
        with collective_layers(), ExitStack() as stack:
            for hook in self.hooks.hooks:
                stack.callback(self.hooks.close, hook)
            stack.enter_context(self._stop.on_signals())
            stack.enter_context(activity.busy("work between steps"))
            activity.current.pace = activity.Pace()
            self._call("on_start")
            self.model.train()
            groups = self.loader.groups(run.step, run.total_steps)
            while True:
                started = time.perf_counter()
                with activity.in_step(run.step + 1):
                    group, fault = self._next(groups)
                if group is None:
                    break
                try:
                    with activity.in_step(run.step + 1):
                        self._step(group, started, fault)
                except Interrupted:
                    self._save_once()
                    message = "Stopped before the first step; nothing was saved."
                    if run.step:
                        message = f"Stopped at step {run.step}; it is saved."
                    raise Interrupted(message, can_resume=run.step > 0) from None
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
                except DataError as error:  # of a row of the validation split
                    raise self._without_data(error) from error
                if self._compare_best():
                    break
                if run.step == run.total_steps:
                    self._save_once()
                elif due := run.counter.due(run.step, run.settings.save_steps):
                    self._save_once(due)
                elif self._ends_epoch():
                    self._save_once()
            self._call("on_end")
            self._compare_best(at_end=True)

    def _ends_epoch(self) -> bool:
        """Whether `save_epochs` asks for a checkpoint at this step."""
        epochs, steps = self.run.settings.save_epochs, self.loader.steps_per_epoch
        return epochs is not None and self.run.step % (epochs * steps) == 0

    def _compare_best(self, *, at_end: bool = False) -> bool:
        """Save the checkpoint if it is the best so far; return whether to stop early."""
        if self.best is None:
            return False
        run, best = self.run, self.best
        if best.improves(run) and run.settings.keep_best:
            self._save_once()
            self.mark_best(run, best.summary())
        measured = at_end or run.counter.due(run.step, run.settings.evaluation_freq)
        if measured and (note := best.never_measured(run)):
            run.console.print(note)
        if best.exhausted and run.step < run.total_steps:
            run.total_steps = run.step
            self._save_once()
            run.console.print(f"Stopped early at step {run.step}: {best.reason()}.")
            return True
        return False

    def _next(self, groups: Iterator[list[Batch]]) -> tuple[list[Batch] | None, XTunerError | None]:
        """The next group, or None at the end; if it cannot be read, an empty group and the
        reason."""
        try:
            return next(groups, None), None
        except XTunerError as error:
            return [], error
        except Exception:
            if self.processes.world_size == 1:
                self._save_once()
            raise

    def _without_data(self, error: DataError) -> DataError:
        """Save the last completed step, and raise an error that explains the problem with the
        data."""
        self._save_once()
        saved = max(self._saved_at, self.run.start_step)
        hint = f"step {saved} is saved, continue with --resume" if saved > 0 else "then start again"
        return DataError(f"{error}; {hint}")

    def _step(self, group: list[Batch], started: float, fault: XTunerError | None = None) -> None:
        """One optimizer step; on an exception the weights are those of the previous step.

        Args:
            group: Micro-batches of this process.
            started: When the data were requested.
            fault: Why this process has no data; all processes then stop together.
        """
        data_seconds = time.perf_counter() - started
        run = self.run
        counts = [float(sum(map(count, group))) for count in self._counts()]
        signs = [float(self._stop.made), float(fault is not None)]
        counts = self.processes.of_rows(counts)
        divisor, supervised, tokens, stops, failed = self.processes.sum([*counts, *signs])
        if failed:
            messages = self.processes.gather([str(fault)] if fault else [])
            raise DataError("; ".join(dict.fromkeys(messages)))
        if stops:
            raise Interrupted
        if supervised and not divisor:
            self._counts_nothing(supervised)
        lr = self._learning_rate()
        self.strategy.set_learning_rate(lr)
        found = self.gradients.compute(group, divisor=divisor, step=run.step)
        if not found.finite:
            self.strategy.zero_grad()
            raise TrainingError(self._not_finite(group, found))
        self._weights_are_consistent = False
        self.strategy.step()
        self._weights_are_consistent = True
        activity.current.pace.steps += 1
        scale = self.loss_scaler.scale
        self.loss_scaler.step_taken()
        run.step += 1
        run.epoch = run.step / self.loader.steps_per_epoch
        seconds = time.perf_counter() - started
        run.scalars = {
            "lr": lr,
            "loss": found.loss,
            "grad_norm": found.norm,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens": supervised,
            "seconds": seconds,
            "data_seconds": data_seconds,
            "memory_mb": memory_mb(self.processes.device),
            **found.metrics,
        }
        if self.loss_scaler.enabled:
            run.scalars["loss_scale"] = scale

    def _counts_nothing(self, supervised: float) -> None:
        """Refuse a first step that has no divisor; note the first one of a later step."""
        problem = (
            f"{type(self.algorithm).__name__}.count returned 0 for every batch of a step with "
            f"{supervised:,.0f} supervised tokens"
        )
        if not self.run.step:
            raise ConfigError(f"{problem}; the loss is divided by it")
        if not self._noted_no_count:
            self._noted_no_count = True
            note = f"Note: step {self.run.step + 1}: {problem}; such a step divides its loss by 1."
            self.run.console.print(note, markup=False)

    def _counts(self) -> tuple[Callable[[Batch], float], ...]:
        """The counts of each micro-batch: its share of the divisor, supervised tokens, tokens."""
        count = functools.partial(checked_count, self.algorithm)
        return (count, lambda b: b.num_supervised, lambda b: b.num_tokens)

    def _learning_rate(self) -> float:
        """The learning rate of the next step."""
        s, run = self.run.settings, self.run
        return learning_rate(
            run.step,
            total_steps=run.total_steps,
            peak=s.lr,
            warmup_ratio=s.warmup_ratio,
            schedule=s.lr_schedule,
            end_ratio=s.lr_end_ratio,
            warmup_steps=run.counter.steps_of(s.warmup_steps),
        )

    def _out_of_memory(self, group: list[Batch]) -> TrainingError:
        """Save the last completed step, and raise an error that says what to change. One of several
        processes cannot save: the others are in the middle of the step and would not join. It
        exits, and the launcher stops the others.
        """
        self.strategy.zero_grad()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        alone, note = self.processes.world_size == 1, ""
        if alone and self._weights_are_consistent:
            try:
                self._save_once()
            except LaunchError as error:
                note = f"The last step is lost: {error} "
        elif not alone:
            note = f"Process {self.processes.rank} ran out of memory; the run ends without saving. "
        if max(self._saved_at, self.run.start_step) > 0:
            note += "Checkpoints are intact; continue with --resume. "
        tokens = max((batch.num_tokens for batch in group), default=0)
        return TrainingError(
            f"step {self.run.step + 1}: out of memory with a row of {tokens:,} tokens. "
            f"{note}{self.memory_advice()}"
        )

    def _not_finite(self, group: list[Batch], found: Gradients) -> str:
        """Name the rows, on any process, whose own loss is non-finite; if there are none, all rows
        of the step."""
        bad = self.processes.gather(self.gradients.rows_not_finite(group))
        rows = bad or self.processes.gather([str(r) for batch in group for r in batch.rows])
        return faults.not_finite(
            self.run.step,
            found,
            list(dict.fromkeys(rows)),
            certain=bool(bad),
            float16=self.loss_scaler.enabled,
        )

    def _save_once(self, count: int | None = None) -> None:
        """Save the current step as checkpoint `count`, by default the current count."""
        self.run.count = self.run.counter.done(self.run.step) if count is None else count
        if self._saved_at != self.run.step and self.run.step != self.run.start_step:
            self.save(self.run)
            self._saved_at = self.run.step

    def _call(self, event: str) -> None:
        self.hooks.call(event)
        self.model.train()
