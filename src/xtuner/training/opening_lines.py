"""The first lines of a run: what will be trained, on what, for how long, and where it goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from xtuner.config.schema import Settings
from xtuner.device.select import name_of
from xtuner.engine.counting import Counter
from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.loss_scaler import INITIAL_SCALE
from xtuner.memory.available import check_disk
from xtuner.memory.plan import MemoryPlan
from xtuner.parallel.layout import RankLayout

_FEW_NAMES = 4
FEW_STEPS = 12
"""Below this number of optimizer steps a fine-tune learns hardly anything."""


def opening_lines(
    s: Settings,
    plan: MemoryPlan,
    *,
    dtype: torch.dtype,
    means: tuple[str, str],
    layout: RankLayout,
    steps: tuple[int, Counter],
    data: Iterable[str],
    chosen: Sequence[str],
    language: str,
    images: str | None,
    packing: str | None,
    positions: str | None,
    work_dir: Path,
) -> Iterator[str]:
    """Yield them in the order in which a reader asks.

    Args:
        s: settings of the run.
        plan: its memory.
        dtype: of the computation.
        means: what is said of threads and kernels, and of attention.
        layout: of the processes that take part.
        steps: optimizer steps of the run, and how they are counted.
        data: lines about the rows.
        language: what is to be said of the script of the rows; may be empty.
        chosen: settings that were 'auto' and are decided by the rows.
        images: line about the vision tower.
        packing: why samples are not packed, where the model decided.
        positions: note on samples longer than the model's positions.
        work_dir: where results go.
    """
    yield from lines_of_model(s, plan, dtype)
    if images:
        yield images
    kernels, attention = means
    yield f"Computing    {_processes(layout)}{kernels}"
    yield f"Attention    {attention}"
    yield from data
    if chosen:
        taken = ", ".join(f"{name} {_taken(getattr(s, name))}" for name in chosen)
        yield f"Recipe       {taken} ('auto': by the amount of data)"
    total, counter = steps
    yield (
        f"Steps        {total:,} ({counter.steps_per_epoch:,} per epoch), each of "
        f"{s.batch_size} (batch_size) x {s.accumulative_counts} (accumulative_counts) x "
        f"{layout.data_world_size} ({_shares(layout)}) {'packs' if s.packs else 'samples'}"
    )
    if packing:
        yield f"Samples      {packing}"
    yield from _counted(s, total, counter)
    if not plan.forecast.failure:
        yield check_disk(work_dir, plan.forecast.checkpoint, limit=s.save_total_limit)
    notes = [
        *filter(None, [language, positions]),
        *_notes_on_steps(s, total, counter),
        *_notes_on_intervals(s, total, counter),
    ]
    if idle := s.without_effect():
        notes.append(f"without effect here: {', '.join(idle)}")
    if plan.device == "cpu" and (plain := optim.unpaged(s.optim_type)) != s.optim_type:
        notes.append(f"a CPU has nothing to page to: {plain} takes the place of {s.optim_type}")
    if s.cuda_graphs is True and plan.device == "cpu":
        notes.append("cuda_graphs changes nothing on a CPU")
    if s.embedding_on_cpu is True and plan.device == "cpu":
        notes.append("embedding_on_cpu changes nothing: all of the model is in the CPU's memory")
    yield from (f"Note         {note}" for note in notes)
    yield f"Results      {work_dir}\n"


def _taken(value: float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"


def _processes(layout: RankLayout) -> str:
    """How many there are, and which share rows; empty for one."""
    if layout.world_size == 1:
        return ""
    size = layout.sequence_world_size
    shared = f", {size} share each row" if size > 1 else ""
    return f"{layout.world_size} processes{shared}; "


def _shares(layout: RankLayout) -> str:
    """What takes rows of its own."""
    return "processes" if layout.sequence_world_size == 1 else "groups"


def lines_of_model(s: Settings, plan: MemoryPlan, dtype: torch.dtype) -> list[str]:
    """What is trained, on what, and the memory that it takes."""
    held = s.effective_quantization
    return [
        f"\nModel        {s.pretrained_model_name_or_path}, {s.algorithm} {s.tuning}"
        + ("" if held == "none" else f" on {held} weights"),
        f"Device       {plan.device}, {name_of(dtype)}{_about(dtype)}",
        *plan.lines(),
    ]


def _about(dtype: torch.dtype) -> str:
    """What is particular about training in `dtype`."""
    if dtype != torch.float16:
        return ""
    return f" (trained weights in float32; the loss is scaled, by {INITIAL_SCALE:,.0f} at first)"


def _counted(s: Settings, total: int, counter: Counter) -> Iterator[str]:
    """Where checkpoints fall, in a run that counts micro-batches."""
    if counter.unit == "optimizer_steps":
        return
    every = counter.of_run(s.save_steps, total)
    shown = [f"iter_{count} (step {step})" for count, step in every[:-1]]
    if len(shown) > _FEW_NAMES:
        shown = [*shown[:_FEW_NAMES], "..."]
    last, step = every[-1]
    names = ", ".join([*shown, f"iter_{last} (step {step})"])
    yield (
        f"Counting     micro-batches of one process: {last:,}, {counter.accumulative_counts} a "
        f"step; saved as {names}"
    )


def _notes_on_intervals(s: Settings, total: int, counter: Counter) -> Iterator[str]:
    """The intervals that the run never reaches."""
    end = counter.done(total)
    rows = [("save_steps", s.save_steps, "only the end is saved")]
    if s.evaluation_inputs or s.validation_ratio or s.validation_path:
        rows.append(("evaluation_freq", s.evaluation_freq, "asked only before and after training"))
    rows.append(("logging_steps", s.logging_steps, "the log has only the last step"))
    for name, every, so in rows:
        if every > end:
            yield f"{name} = {every:,} is more than the {end:,} {counter.words} of this run: {so}"


def _notes_on_steps(s: Settings, total: int, counter: Counter) -> list[str]:
    """What a beginner should know of the number of steps before the run, not after it."""
    notes = []
    end = counter.done(total)
    if s.max_steps and s.max_steps > end:
        notes.append(
            f"max_steps = {s.max_steps} is not reached: max_epochs = {s.max_epochs} ends the run "
            f"at {end}; raise max_epochs"
        )
    elif s.max_steps and s.max_steps < end:
        notes.append(
            f"max_steps = {s.max_steps} micro-batches end within step {total}: it is done whole, "
            f"with {end}"
        )
    if total < FEW_STEPS and (s.max_steps is None or end < s.max_steps):
        hint = "accumulative_counts = 'auto', and " if s.accumulates else ""
        notes.append(
            f"only {total} steps: with so little data hardly anything is learned; set "
            f"{hint}max_epochs = 'auto'"
        )
    return notes
