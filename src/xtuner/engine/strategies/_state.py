"""Optimizer state with one entry per parameter, independent of the strategy.

The format is that of `torch.optim.Optimizer.state_dict` on a single process. An optimizer that
replaces another (`substitute`) reads and writes that optimizer's entries, so that a run can be
resumed with another strategy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from xtuner.engine.optimizer import optim
from xtuner.engine.optimizer.state_check import check_state

ELEMENTWISE = frozenset(
    {"Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "ASGD", "RMSprop", "Rprop", "Adagrad",
     "Adadelta"}
)  # fmt: skip
"""Elementwise optimizers of torch, for which each process can step its own shard."""

_RENAMED = {"exp_avg": "state1", "exp_avg_sq": "state2"}
"""Entries of torch's Adam and AdamW, and their names in bitsandbytes."""


def substitute(optim_type: str) -> str | None:
    """The torch optimizer that steps a shard as `optim_type` steps the full weights; None if there
    is none."""
    if optim_type in ELEMENTWISE:
        return optim_type
    name = optim.unpaged(optim_type).removesuffix("32bit")
    return name if name in ("Adam", "AdamW") else None


def check_optimizer(optim_type: str) -> Iterator[tuple[str, str]]:
    """Yield a problem if `optim_type` cannot step shards."""
    if substitute(optim_type) is None:
        yield (
            "optim_type",
            f"{optim_type!r} does not support sharded weights; set 'AdamW', whose state is "
            f"sharded across processes, or strategy = 'replicated'",
        )


def full_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of `optimizer` as in `state_dict`: indices instead of parameters."""
    first, groups = 0, []
    for group in optimizer.param_groups:
        numbers = list(range(first, first + len(group["params"])))
        groups.append({**group, "params": numbers})
        first += len(numbers)
    return groups


def check_full_state(groups: Sequence[Sequence[torch.Size]], state: Mapping[str, Any]) -> None:
    """Raise ValueError if `state` does not fit parameters of these shapes."""
    shaped = [{"params": [torch.empty(s, device="meta") for s in group]} for group in groups]
    check_state(SimpleNamespace(param_groups=shaped), state)


def to_saved(optim_type: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the entries of the optimizer that steps to those of `optim_type`."""
    if substitute(optim_type) == optim_type:
        return dict(entries)
    named = {_RENAMED.get(name, name): value for name, value in entries.items()}
    if "step" in named:
        named["step"] = int(named["step"])
    return named


def from_saved(optim_type: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Convert entries of `optim_type` to those of the optimizer that steps; the inverse of
    `to_saved`."""
    if substitute(optim_type) == optim_type:
        return dict(entries)
    ours = {theirs: own for own, theirs in _RENAMED.items()}
    nested = entries.get("__bnb_optimizer_quant_state__")
    flat = {**entries, **(nested if isinstance(nested, Mapping) else {})}
    flat.pop("__bnb_optimizer_quant_state__", None)
    named = {ours.get(name, name): value for name, value in flat.items()}
    if "step" in named and not isinstance(named["step"], Tensor):
        named["step"] = torch.tensor(float(named["step"]))
    return named
