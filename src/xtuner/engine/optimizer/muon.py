"""Muon (Jordan et al., 2024) for weight matrices, and AdamW for all other parameters.

torch.optim.Muon takes matrices only. Embeddings, the output head, norms and biases get AdamW, as
its authors recommend. Learning rates are scaled so that updates have the size of AdamW's, and the
same lr serves both (arXiv:2502.16982, section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

_NOT_HIDDEN = re.compile(r"(embed|wte|wpe|lm_head|output_layer)")


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer with the state of two.

    Args:
        named: The trained parameters by name.
        lr: Learning rate of both.
        betas: The betas of AdamW.
        weight_decay: Weight decay of parameters with two or more dimensions.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        named = list(named)
        hidden = [p for n, p in named if p.ndim == 2 and not _NOT_HIDDEN.search(n)]
        chosen = {id(p) for p in hidden}
        others = [p for _, p in named if id(p) not in chosen]
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            self._parts.append(
                torch.optim.Muon(
                    hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if groups := [group for group in groups if group["params"]]:
            self._parts.append(torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True))
        super().__init__([{"params": [*hidden, *others]}], {"lr": lr})
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        self._share()

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Step both optimizers."""
        for part in self._parts:
            part.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of both."""
        super().load_state_dict(state_dict)
        first = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + count]
            first += count
        self._share()

    def _share(self) -> None:
        """Let both optimizers write to this one's state."""
        state: Any = self.state
        for part in self._parts:
            part.state = state
