"""Measures the memory of a step on tensors without values, by counting the bytes that are alive."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts, after every operation, the bytes of all live storages created while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.history: list[int] = []
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage(), given)
        self.history.append(self.live)
        return result

    def _count(self, storage: Any, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def pretend_cpu(model: nn.Module) -> None:
    """Replace meta tensors by ones that claim to be on a CPU; shared tensors stay shared."""
    made: dict[int, Tensor] = {}

    def stand_in(x: Tensor) -> Tensor:
        if id(x) not in made:
            fake = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            made[id(x)] = (
                nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
            )
        return made[id(x)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = stand_in(x)  # type: ignore[assignment]
