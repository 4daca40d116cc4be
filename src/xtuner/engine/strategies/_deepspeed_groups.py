"""The parameter groups of an optimizer that DeepSpeed steps.

DeepSpeed flattens each group into one tensor and steps all of them, with zeros for weights without
a gradient, which would still decay them and their moments. Weights that only images use are
therefore moved into groups of their own, which are left alone in a step without images. Saved
state keeps the original groups.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.engine.strategies import _state

_OF_IMAGES = "of_images"


class Groups:
    """Splits the groups of `optimizer`.

    Args:
        optimizer: A new optimizer.
        images: The `id` of each parameter that only images use.

    Attributes:
        parameters: The trained parameters, in the order of the original groups.
        shapes: Their shapes, by original group.
        split: Whether some groups are left alone in steps without images.
        step_images: Whether the next step includes those groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, images: Collection[int]) -> None:
        self._saved = _state.full_groups(optimizer)
        original = [list(group["params"]) for group in optimizer.param_groups]
        self.parameters: list[nn.Parameter] = [p for group in original for p in group]
        self.shapes = [[p.shape for p in group] for group in original]
        self.step_images = True
        self._origin: list[int] = []
        made = []
        for number, group in enumerate(optimizer.param_groups):
            for wanted in (False, True):
                part = [p for p in group["params"] if (id(p) in images) == wanted]
                if part:
                    made.append({**group, "params": part, _OF_IMAGES: wanted})
                    self._origin.append(number)
        optimizer.param_groups[:] = made
        self._index = {id(p): i for i, group in enumerate(made) for p in group["params"]}
        self.split = any(group[_OF_IMAGES] for group in made)
        self._held: list[tuple[Any, Tensor | None]] = []
        if self.split:
            optimizer.register_step_pre_hook(self._hold)
            optimizer.register_step_post_hook(self._give_back)

    def _hold(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Remove the gradients of groups that this step leaves alone: it then skips them."""
        for group in () if self.step_images else optimizer.param_groups:
            for parameter in group["params"] if group[_OF_IMAGES] else ():
                self._held.append((parameter, parameter.grad))
                parameter.grad = None

    def _give_back(self, *_: Any) -> None:
        """Restore the gradients: with offload, DeepSpeed reuses their memory."""
        for parameter, gradient in self._held:
            parameter.grad = gradient
        self._held.clear()

    def index_of(self, parameter: nn.Parameter) -> int:
        """The group that `parameter` is in now."""
        return self._index[id(parameter)]

    def saved(self, optimizer: Any) -> list[dict[str, Any]]:
        """The original groups with the current options of `optimizer`."""
        groups = []
        for number, group in enumerate(self._saved):
            now = dict(optimizer.param_groups[self._origin.index(number)])
            now.pop(_OF_IMAGES, None)
            groups.append({**now, "params": group["params"]})
        return groups
