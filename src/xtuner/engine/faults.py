"""What is said about a step that could not be taken."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xtuner.device.select import FLOAT16_OVERFLOWS


def not_finite(
    step: int,
    *,
    loss: float,
    norm: float,
    rows: Sequence[str],
    certain: bool,
    float16: bool = False,
) -> str:
    """A loss or gradient is no number.

    Args:
        step: the last whole step.
        loss: of the step that was not taken.
        norm: of its gradients.
        rows: where its data come from.
        certain: `rows` are those whose own loss is not finite, and not all of the step.
        float16: the run computes in float16.
    """
    which = "these rows have a loss that is not finite" if certain else "it was made of these rows"
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    hint = "the step before is saved, continue with --resume" if step else "start again"
    advice = "lower lr, or set dtype = 'float32'"
    if float16 and not math.isfinite(loss):
        advice = f"or lower lr. {FLOAT16_OVERFLOWS}"
    elif float16:
        advice += ": even without a scale of the loss these gradients are too large for float16"
    return (
        f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite, so the step was not "
        f"taken; {which}: {'; '.join(rows[:10])}{more}.\n  Look at the rows with "
        f"`xtuner log-dataset`, {advice}; {hint}."
    )


def out_of_memory(step: int, *, tokens: int, note: str, saved: bool, advice: str) -> str:
    """Memory ran out.

    Args:
        step: the one that was not taken.
        tokens: of the longest row in it.
        note: what was lost.
        saved: whether there is a checkpoint to go on from.
        advice: what to change.
    """
    resume = "Checkpoints are intact; continue with --resume. " if saved else ""
    return f"step {step}: out of memory, with {tokens:,} tokens at once. {note}{resume}{advice}"
