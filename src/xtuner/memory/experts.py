"""A mixture of experts on meta tensors. transformers multiplies the tokens of all experts in one
grouped matmul, which torch supports on meta tensors for bfloat16 only. This replacement allocates
and saves the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "xtuner_footprint"
"""Name in transformers' experts interface."""


def use_footprint(model: Any) -> None:
    """Make the experts of `model` (a transformers model on the meta device) countable, if it uses
    transformers' experts interface."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _experts)
    if model._can_set_experts_implementation():
        model.set_experts_implementation(NAME)


def _experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The experts' output ``[T, H]`` for tokens ``[T, H]`` that go to k experts each."""
    tokens, k = hidden.shape[0], index.shape[-1]
    chosen = hidden[:, None].expand(-1, k, -1).reshape(tokens * k, -1)
    first = module.gate_up_proj if module.has_gate else module.up_proj
    out = _product(chosen, first, module)
    out = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    out = _product(out, module.down_proj, module)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * weights.reshape(-1, 1)
    return out.view(tokens, k, -1).sum(dim=1).to(hidden.dtype)


def _product(tokens: Tensor, weight: nn.Parameter, module: Any) -> Tensor:
    width = weight.shape[-1] if module.is_transposed else weight.shape[-2]
    out: Tensor = _GroupedFootprint.apply(tokens.to(weight.dtype), weight, width)  # type: ignore[no-untyped-call]
    return out


class _GroupedFootprint(torch.autograd.Function):
    """Saves what a grouped matmul saves for the backward pass: its inputs."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        return tokens.new_empty(tokens.shape[0], width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tokens, weight = ctx.saved_tensors
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        return torch.empty_like(tokens), of_weight, None
