"""The state of an optimizer, one entry per parameter, whatever strategy holds it.

The format is that of `torch.optim.Optimizer.state_dict` on a single process. An optimizer that
takes the place of another (`substitute`) reads and writes the entries of that one, so that a run
may go on with another strategy.
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
"""Optimizers of torch that treat every number alike, so that each process may step over its
part."""

_RENAMED = {"exp_avg": "state1", "exp_avg_sq": "state2"}
"""Entries of torch's Adam and AdamW, and what bitsandbytes calls them."""


def substitute(optim_type: str) -> str | None:
    """The optimizer of torch that steps over a part of the weights as `optim_type` would over all
    of them; None if there is none."""
    if optim_type in ELEMENTWISE:
        return optim_type
    name = optim.unpaged(optim_type).removesuffix("32bit")
    return name if name in ("Adam", "AdamW") else None


def check_optimizer(optim_type: str) -> Iterator[tuple[str, str]]:
    """Yield a problem if `optim_type` cannot step over a part of the weights."""
    if substitute(optim_type) is None:
        yield (
            "optim_type",
            f"{optim_type!r} cannot step over a part of the weights; set 'AdamW', whose state is "
            "divided among the processes, or strategy = 'replicated'",
        )


def full_groups(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups of `optimizer` as `state_dict` gives them: numbers for parameters."""
    first, groups = 0, []
    for group in optimizer.param_groups:
        numbers = list(range(first, first + len(group["params"])))
        groups.append({**group, "params": numbers})
        first += len(numbers)
    return groups


def check_full_state(groups: Sequence[Sequence[torch.Size]], state: Mapping[str, Any]) -> None:
    """Raise ValueError if `state` cannot be that of parameters of these shapes."""
    shaped = [{"params": [torch.empty(s, device="meta") for s in group]} for group in groups]
    check_state(SimpleNamespace(param_groups=shaped), state)


def to_saved(optim_type: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the optimizer that steps, as `optim_type` would save them."""
    if substitute(optim_type) == optim_type:
        return dict(entries)
    named = {_RENAMED.get(name, name): value for name, value in entries.items()}
    if "step" in named:
        named["step"] = int(named["step"])
    return named


def from_saved(optim_type: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_saved` gave, or `optim_type` itself, as the optimizer that steps has it."""
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
