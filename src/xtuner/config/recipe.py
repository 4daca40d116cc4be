"""Resolves 'auto' in the settings that depend on the amount of data.

A model learns facts from repetition. With few rows a run needs many epochs and small steps; with
many rows, large steps and few epochs. benchmarks/recipe.py measures what these rules reach
(docs/benchmarks.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.config.schema import Settings

AUTOMATIC = ("lora_alpha", "pack_length", "accumulative_counts", "max_epochs")
"""The settings whose 'auto' `resolved` replaces."""
EPOCH_STEPS = 128
"""An epoch has this many steps if the data suffice: packs are shorter than `max_length` where there
would be fewer, and gradients of several micro-batches are summed only if as many remain."""
PACK_SAMPLES = 4
"""Packs are not so short that they hold fewer samples than this, on average."""
MOST_ACCUMULATED = 16
EPOCHS = ((1_000, 15), (10_000, 3))
"""Distinct rows, and how often a run repeats each; between the two points the logarithms are
interpolated."""
LONG_EPOCH, MANY_ROWS = 1_000, EPOCHS[-1][0]
"""More rows than MANY_ROWS are not repeated if an epoch has this many steps."""


def pack_length(settings: Settings, *, lengths: Sequence[int], limit: int) -> int:
    """Tokens of a pack.

    Args:
        settings: The settings; `pack_length` and the size of a step are used.
        lengths: Tokens of each sample; the longest has to fit.
        limit: Tokens of a full pack.
    """
    given = settings.pack_length
    if given == "auto" and settings.accumulative_counts != "auto":
        return limit
    if given != "auto" and given >= settings.max_length:
        return limit
    tokens = sum(lengths)
    few = tokens / min(EPOCH_STEPS * settings.batch_size, max(1, len(lengths) // PACK_SAMPLES))
    return min(limit, max(*lengths, math.ceil(few) if given == "auto" else given))


def resolved(
    settings: Settings, *, rows: int, packs: int, length: int, ranks: int, repetitions: float = 1
) -> Settings:
    """`settings` with numbers instead of 'auto'.

    Args:
        settings: The run's settings.
        rows: Samples per epoch.
        packs: Packs (or unpacked samples) per epoch.
        length: Tokens per pack.
        ranks: Number of processes that take different rows.
        repetitions: How often an epoch reads each different row, on average.
    """
    micro_batches = math.ceil(packs / (settings.batch_size * ranks))
    summed = min(MOST_ACCUMULATED, max(1, micro_batches // EPOCH_STEPS))
    given = settings.accumulative_counts
    accumulated = summed if given == "auto" else given
    steps = epoch_steps(settings, packs=packs, accumulated=accumulated, ranks=ranks)
    epochs = _epochs(rows, repetitions, steps, settings.max_steps)
    values = {
        "lora_alpha": settings.effective_lora_alpha,
        "pack_length": length,
        "accumulative_counts": accumulated,
        "max_epochs": epochs,
    }  # only those that are 'auto' are used
    return settings.model_copy(update={n: values[n] for n in chosen(settings)})


def epoch_steps(settings: Settings, *, packs: int, accumulated: int, ranks: int) -> int:
    """Optimizer steps of an epoch.

    Args:
        settings: The settings; `batch_size` is used.
        packs: Packs (or unpacked samples) per epoch.
        accumulated: Micro-batches per step.
        ranks: Number of processes that take different rows.
    """
    return math.ceil(packs / (settings.batch_size * accumulated * ranks))


def chosen(settings: Settings) -> tuple[str, ...]:
    """Names of the settings that are 'auto' and matter to this run."""
    names = [name for name in AUTOMATIC if getattr(settings, name) == "auto"]
    idle = {*settings.idle()}
    return tuple(name for name in names if name not in idle)


def as_before(settings: Settings, earlier: Mapping[str, Any]) -> Settings:
    """`settings` with the numbers of the resumed run instead of 'auto'.

    Args:
        settings: The settings of the resumed run.
        earlier: The checkpoint's settings by name.
    """
    known = {**full_packs(earlier), **earlier}
    by_steps = settings.max_steps is not None or earlier.get("max_steps") is not None
    numbers = {
        name: known[name]
        for name in AUTOMATIC
        if not (name == "max_epochs" and by_steps)  # those that max_steps needs
        and getattr(settings, name) == "auto"
        and isinstance(known.get(name), int | float)
    }
    return settings.model_copy(update=numbers)


def full_packs(values: Mapping[str, Any]) -> dict[str, Any]:
    """The `pack_length` of a run that is older than this setting: packs were full."""
    return {"pack_length": values["max_length"]} if "max_length" in values else {}


def _epochs(rows: int, repetitions: float, steps: int, max_steps: int | None) -> int:
    """Epochs of `rows` samples, of which each occurs `repetitions` times, in `steps` steps."""
    if max_steps is not None:
        return math.ceil(max_steps / steps)
    distinct = rows / repetitions
    if steps >= LONG_EPOCH and distinct > MANY_ROWS:
        return 1
    (few, most), (many, least) = EPOCHS
    share = math.log(min(max(distinct, few), many) / few) / math.log(many / few)
    return max(1, round(most * math.pow(least / most, share) / repetitions))
