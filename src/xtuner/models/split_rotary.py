"""Rotary embeddings for a part of a row, if frequencies depend on the row's longest sample.

For 'dynamic' and 'longrope', transformers reads the largest position of its input. Processes with
different parts of a row would read different values, so these modules get the positions of the
entire row, and their result is sliced.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

KINDS = ("dynamic", "longrope")


class SplitRotary:
    """Installs forward hooks on the modules of `model` that need this."""

    def __init__(self, model: nn.Module) -> None:
        self._row: tuple[Tensor, slice] | None = None
        for module in model.modules():
            kinds = getattr(module, "rope_type", None)
            named = kinds.values() if isinstance(kinds, dict) else (kinds,)
            if any(isinstance(kind, str) and kind in KINDS for kind in named):
                module.register_forward_pre_hook(self._before, with_kwargs=True)
                module.register_forward_hook(self._after)

    @contextmanager
    def part_of(self, positions: Tensor, share: slice) -> Iterator[None]:
        """Calls inside the block compute the part `share` of a row with these positions ``[...,
        N]``."""
        self._row = positions, share
        try:
            yield
        finally:
            self._row = None

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._row is None:
            return None
        positions, _ = self._row
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": positions}
        return (args[0], positions, *args[2:]), kwargs

    def _after(self, module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
        if self._row is None:
            return None
        _, share = self._row
        return tuple(x[:, share] for x in output)
