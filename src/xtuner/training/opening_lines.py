"""The first lines of a run: what is trained, on which data, for how long, and where results go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from xtuner.config.schema import Settings
from xtuner.device.select import name_of
from xtuner.engine.counting import Counter
from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.loss_scaler import INITIAL_SCALE
from xtuner.errors import count
from xtuner.memory.available import check_disk
from xtuner.memory.plan import MemoryPlan
from xtuner.parallel.layout import RankLayout

_FEW_NAMES = 4
FEW_STEPS = 12
"""With fewer optimizer steps, fine-tuning has hardly any effect."""


def opening_lines(
    s: Settings,
    plan: MemoryPlan,
    *,
    dtype: torch.dtype,
    computing: tuple[str, str],
    layout: RankLayout,
    steps: tuple[int, Counter],
    data: Iterable[str],
    chosen: Sequence[str],
    images: str | None,
    packing: str | None,
    notes: Sequence[str | None],
    work_dir: Path,
) -> Iterator[str]:
    """Yield the first lines of a run.

    Args:
        dtype: The dtype of the computation.
        computing: Lines on threads and kernels, and on attention.
        steps: Optimizer steps of the run, and how they are counted.
        data: Lines about the rows.
        chosen: The values of 'auto' settings that depend on the rows.
        images: Line about the vision tower.
        packing: Why the model's samples are not packed.
        notes: Notes on the rows.
    """
    yield from lines_of_model(s, plan, dtype)
    if images:
        yield images
    kernels, attention = computing
    yield f"Computing    {_processes(layout)}{kernels}"
    yield f"Attention    {attention}"
    yield from data
    if chosen:
        taken = ", ".join(f"{name} {_taken(getattr(s, name))}" for name in chosen)
        yield f"Recipe       {taken} ('auto': by the amount of data)"
    total, counter = steps
    unit = "processes" if layout.sequence_world_size == 1 else "groups"
    yield (
        f"Steps        {total:,} ({counter.steps_per_epoch:,} per epoch), each of "
        f"{s.batch_size} (batch_size) x {s.accumulative_counts} (accumulative_counts) x "
        f"{layout.data_world_size} ({unit}) {'packs' if s.packs else 'samples'}"
    )
    if packing:
        yield f"Samples      {packing}"
    yield from _counted(s, total, counter)
    if not plan.forecast.failure:
        yield check_disk(work_dir, plan.forecast.checkpoint, limit=s.save_total_limit)
    notes = [
        *filter(None, notes),
        *_notes_on_steps(s, total, counter),
        *_notes_on_intervals(s, total, counter),
        *_notes_on_effect(s, plan.device),
    ]
    yield from (f"Note         {note}" for note in notes)
    yield f"Results      {work_dir}\n"


def _taken(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _processes(layout: RankLayout) -> str:
    """The number of processes, and how many share rows; empty for one."""
    if layout.world_size == 1:
        return ""
    size = layout.sequence_world_size
    shared = f", {size} share each row" if size > 1 else ""
    return f"{layout.world_size} processes{shared}; "


def lines_of_model(s: Settings, plan: MemoryPlan, dtype: torch.dtype) -> list[str]:
    """What is trained, on which device, and the memory it needs."""
    held = s.effective_quantization
    return [
        f"\nModel        {s.pretrained_model_name_or_path}, {s.algorithm} {s.tuning}"
        + ("" if held == "none" else f" on {held} weights"),
        f"Device       {plan.device}, {name_of(dtype)}{_about(dtype)}",
        *plan.lines(),
    ]


def _about(dtype: torch.dtype) -> str:
    """What is special about training in `dtype`."""
    if dtype != torch.float16:
        return ""
    return f" (trained weights in float32; the loss scale starts at {INITIAL_SCALE:,.0f})"


def _counted(s: Settings, total: int, counter: Counter) -> Iterator[str]:
    """Which checkpoints are saved, in a run that counts micro-batches."""
    if counter.unit == "optimizer_steps":
        return
    every = counter.of_run(s.save_steps, total)
    shown = [f"iter_{count} (step {step})" for count, step in every[:-1]]
    if len(shown) > _FEW_NAMES:
        shown = [*shown[:_FEW_NAMES], "..."]
    last, step = every[-1]
    names = ", ".join([*shown, f"iter_{last} (step {step})"])
    yield (
        f"Counting     micro-batches of one process: {last:,}, {counter.accumulative_counts} per "
        f"step; saved as {names}"
    )


def _notes_on_intervals(s: Settings, total: int, counter: Counter) -> Iterator[str]:
    """Intervals that the run never reaches."""
    end = counter.done(total)
    rows = []
    if s.save_epochs is None and not s.keep_best:
        rows.append(("save_steps", s.save_steps, "only the end of the run is saved"))
    if s.evaluation_inputs or s.validation_ratio or s.validation_path:
        rows.append(
            (
                "evaluation_freq",
                s.evaluation_freq,
                "questions are asked only before and after training",
            )
        )
    rows.append(("logging_steps", s.logging_steps, "only the last step is logged"))
    for name, every, so in rows:
        if every > end:
            yield f"{name} = {every:,} is more than the {counter.words(end)} of this run: {so}"


def _notes_on_effect(s: Settings, device: str) -> Iterator[str]:
    if idle := s.without_effect():
        yield f"settings without effect in this run: {', '.join(idle)}"
    if device != "cpu":
        return
    if (plain := optim.unpaged(s.optim_type)) != s.optim_type:
        yield f"paged optimizers need a GPU: {plain} replaces {s.optim_type}"
    if s.cuda_graphs is True:
        yield "cuda_graphs has no effect on a CPU"
    if s.embedding_on_cpu is True:
        yield "embedding_on_cpu has no effect: the entire model is in CPU memory"


def _notes_on_steps(s: Settings, total: int, counter: Counter) -> Iterator[str]:
    """Notes on a number of steps that is unlikely to be intended."""
    end = counter.done(total)
    if s.max_steps and s.max_steps > end:
        yield (
            f"max_steps = {s.max_steps} will not be reached: max_epochs = {s.max_epochs} ends the "
            f"run at {end}; raise max_epochs"
        )
    elif s.max_steps and s.max_steps < end:
        yield (
            f"max_steps = {s.max_steps} ends within step {total}, which is completed at {end} "
            f"micro-batches"
        )
    if total < FEW_STEPS and (s.max_steps is None or end < s.max_steps):
        hint = "accumulative_counts = 'auto', and " if s.accumulates else ""
        yield f"only {count(total, 'step')}, too few to learn much; set {hint}max_epochs = 'auto'"
