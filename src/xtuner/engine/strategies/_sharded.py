"""What strategies share in which each process steps its own shards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.engine.strategies import _parts, _state
from xtuner.engine.strategies.base import BaseStrategy


class ShardedStrategy(BaseStrategy):
    """Clips, scales and steps shards; a subclass knows where they are."""

    gathers = True

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Refuse optimizers that need full weights."""
        yield from super().check(settings)
        yield from _state.check_optimizer(settings.optim_type)

    def optimizer_for(self, optim_type: str) -> str:
        """The torch optimizer, if `optim_type` needs full weights."""
        name = _state.substitute(optim_type) or optim_type
        if name != optim_type:
            self.notes.append(f"{name} replaces {optim_type}: its state is sharded")
        return name

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """The gradients of this process's shards."""

    def unscale(self, factor: float) -> None:
        """Multiply the gradients of this process's shards."""
        if parts := self._gradients():
            torch._foreach_mul_(parts, factor)

    def clip_gradients(self, max_norm: float | None) -> float:
        """Clip by the global norm over the shards of all processes."""
        parts = self._gradients()
        norm = _parts.norm_of_parts(parts, self.processes)
        _parts.scale_to(parts, max_norm, norm)
        return norm

    def _saw_images(self, model: Any) -> bool:
        """Whether a process had images since the last call; a collective call."""
        (seen,) = self.processes.sum([float(model.saw_images)])
        model.saw_images = False
        return bool(seen)
