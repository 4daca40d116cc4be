"""Rotary embeddings whose frequencies depend on the longest sample of a row, for a part of a row.

transformers reads the largest position of what it is given ('dynamic', 'longrope'). A process that
has a part of the row would see another one than the process with the rest, so these modules get the
positions of the row, and their result is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

KINDS = ("dynamic", "longrope")


class SplitRotary:
    """Changes the calls of the modules of `model` that need it, through forward hooks."""

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
        """Calls inside the block are of the part `share` of a row with these positions
        ``[..., N]``."""
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
