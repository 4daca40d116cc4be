"""The loss scaler of training in float16 (arXiv:1710.03740, section 3.2).

float16 represents no numbers below 6e-8 or above 65,504. Gradients are often smaller, so the loss
is multiplied by a scale before the backward pass and the gradients are divided by it afterwards, in
float32. The scale is a power of two, so scaling does not round, and adapts to the gradients:

    a gradient overflows      ─► the scale is halved, and the same step is done again
    GROWTH_STEPS steps do not ─► the scale is doubled

Unlike `torch.amp.GradScaler`, no step and no row is skipped. The state is that after the last
completed step: an aborted step does not change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
SMALLEST_SCALE = 1.0
"""Gradients that overflow with this scale overflow without scaling, too."""
LARGEST_SCALE = 2.0**24
GROWTH_STEPS = 200
"""Steps between attempts to double the scale; each costs at most one recomputed step."""


class LossScaler:
    """A dynamic loss scale.

    Args:
        enabled: False disables scaling.
        scale: The initial scale, a power of two.

    Attributes:
        scale: The factor of the loss in the current step.
    """

    def __init__(self, *, enabled: bool = True, scale: float = INITIAL_SCALE) -> None:
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self._taken = (self.scale, 0)  # the scale after the last step, and the finite steps with it

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScaler:
        """The scaler for computation in `dtype`; enabled only for float16."""
        return cls(enabled=dtype == torch.float16)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return `loss` times the scale, in float32; multiply its gradients by `inverse`."""
        return loss.float() * self.scale if self.enabled else loss

    @property
    def inverse(self) -> float:
        """The factor that unscales gradients, as float32."""
        return 1.0 / self.scale

    def lower(self) -> bool:
        """Halve the scale after an overflow; return False if it is already at the minimum."""
        if not self.enabled or self.scale <= SMALLEST_SCALE:
            return False
        self.scale /= 2
        return True

    def step_taken(self) -> None:
        """Count a step whose gradients were finite."""
        if not self.enabled:
            return
        before, good = self._taken
        good = good + 1 if self.scale == before else 1
        if good >= GROWTH_STEPS and self.scale < LARGEST_SCALE:
            self.scale, good = self.scale * 2, 0
        self._taken = (self.scale, good)

    def state_dict(self) -> dict[str, Any]:
        """The state after the last completed step; empty if scaling is disabled."""
        if not self.enabled:
            return {}
        scale, good = self._taken
        return {"scale": scale, "good_steps": good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`; an empty state, from a run without scaling, resets the scale."""
        if self.enabled and state:
            self.scale = float(state["scale"])
            self._taken = (self.scale, int(state["good_steps"]))
