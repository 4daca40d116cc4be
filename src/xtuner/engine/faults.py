"""The error message for a step that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xtuner.device.select import FLOAT16_OVERFLOWS
from xtuner.engine.gradients import Gradients


def not_finite(
    step: int, found: Gradients, rows: Sequence[str], *, certain: bool, float16: bool
) -> str:
    """The message for a non-finite loss or gradient.

    Args:
        step: The last completed step.
        found, rows: Of the failed step.
        certain: `rows` are only the rows whose own loss is non-finite, not all rows of the step.
    """
    which = "the loss of these rows is not finite" if certain else "the step used these rows"
    more = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    hint = "the step before is saved, continue with --resume" if step else "start again"
    advice = "lower lr, or set dtype = 'float32'"
    if float16 and not math.isfinite(found.loss):
        advice = f"or lower lr. {FLOAT16_OVERFLOWS}"
    elif float16:
        advice += ": even without loss scaling these gradients overflow float16"
    return (
        f"step {step + 1}: loss {found.loss}, gradient norm {found.norm}: not finite, so the step "
        f"was not taken; {which}: {'; '.join(rows[:10])}{more}.\n  Look at the rows with "
        f"`xtuner log-dataset`, {advice}; {hint}."
    )
