"""Error messages for steps that fail."""

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
    """The message for a non-finite loss or gradient.

    Args:
        step: The last completed step.
        loss: The loss of the failed step.
        norm: The norm of its gradients.
        rows: The rows that its data come from.
        certain: `rows` are only the rows whose own loss is non-finite, not all rows of the step.
        float16: Whether the run computes in float16.
    """
    which = "the loss of these rows is not finite" if certain else "the step used these rows"
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    hint = "the step before is saved, continue with --resume" if step else "start again"
    advice = "lower lr, or set dtype = 'float32'"
    if float16 and not math.isfinite(loss):
        advice = f"or lower lr. {FLOAT16_OVERFLOWS}"
    elif float16:
        advice += ": even without loss scaling these gradients overflow float16"
    return (
        f"step {step + 1}: loss {loss}, gradient norm {norm}: not finite, so the step was not "
        f"taken; {which}: {'; '.join(rows[:10])}{more}.\n  Look at the rows with "
        f"`xtuner log-dataset`, {advice}; {hint}."
    )


def out_of_memory(step: int, *, tokens: int, note: str, saved: bool, advice: str) -> str:
    """The message for running out of memory.

    Args:
        step: The failed step.
        tokens: Tokens in its longest row.
        note: What was lost.
        saved: Whether there is a checkpoint to resume from.
        advice: What to change.
    """
    resume = "Checkpoints are intact; continue with --resume. " if saved else ""
    return f"step {step}: out of memory with a row of {tokens:,} tokens. {note}{resume}{advice}"
