"""The loss scaler of training in float16 (arXiv:1710.03740, section 3.2).

float16 has no numbers below 6e-8 and none above 65,504. Gradients are often smaller, so the loss is
multiplied by a scale before the backward pass and gradients are divided by it afterwards, in
float32. The scale is a power of two, which changes no digit of a gradient, and follows the
gradients:

    a gradient overflows      ─► the scale is halved, and the same step is done again
    GROWTH_STEPS steps do not ─► the scale is doubled

No step and no row is skipped, unlike with `torch.amp.GradScaler`. What counts is the state after
the last step that was taken: a step that is broken off leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INITIAL_SCALE = 2.0**16
SMALLEST_SCALE = 1.0
"""Gradients that overflow with this scale overflow by themselves: scaling does not help."""
LARGEST_SCALE = 2.0**24
GROWTH_STEPS = 200
"""An attempt to double the scale costs at most one step in so many."""


class LossScaler:
    """A dynamic loss scale.

    Args:
        enabled: False leaves losses and gradients as they are.
        scale: the first scale, a power of two.

    Attributes:
        scale: what the loss is multiplied by in the step that is being done.
    """

    def __init__(self, *, enabled: bool = True, scale: float = INITIAL_SCALE) -> None:
        self.enabled = enabled
        self.scale = scale if enabled else 1.0
        self._taken = (self.scale, 0)  # the scale after the last step, good steps with it

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> LossScaler:
        """The scaler for computing in `dtype`; only float16 needs one."""
        return cls(enabled=dtype == torch.float16)

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss` times the scale, in float32; its gradients are to be multiplied by `inverse`."""
        return loss.float() * self.scale if self.enabled else loss

    @property
    def inverse(self) -> float:
        """What gradients of the scaled loss are multiplied by, as float32."""
        return 1.0 / self.scale

    def lower(self) -> bool:
        """Halve the scale after an overflow; False if it is as low as it gets."""
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
        """The state after the last step that was taken; empty where there is no scale."""
        if not self.enabled:
            return {}
        scale, good = self._taken
        return {"scale": scale, "good_steps": good}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; from an empty one, of a run without a scale, start again."""
        if self.enabled and state:
            self.scale = float(state["scale"])
            self._taken = (self.scale, int(state["good_steps"]))
