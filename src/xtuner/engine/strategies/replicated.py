"""Every process holds all weights, gradients and optimizer state; gradients are summed per step.

On a single process nothing is summed. On a GPU, a bitsandbytes optimizer steps over flat buffers if
this gives the same bits (`engine.optimizer.flat`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.engine.optimizer import flat_check, optim
from xtuner.engine.optimizer.flat import FlatOptimizer
from xtuner.engine.optimizer.state_check import check_state
from xtuner.engine.spill import as_it_is
from xtuner.engine.strategies.base import BaseStrategy, Keep, MakeOptimizer


class Strategy(BaseStrategy):
    """Plain data parallelism, with one exact loss divisor over all processes."""

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Leave `model` unchanged; its optimizer steps over flat buffers if possible."""
        self.model = model
        self.parameters = optim.trainable(model)
        self.optimizer = self._flat(make_optimizer(model))
        return self.optimizer

    def _flat(self, made: Any) -> Any:
        if not flat_check.wants_flat_steps(made):
            return made
        fault = flat_check.fault_in_flat_steps(made)
        if faults := self.processes.gather([fault] if fault else []):
            self.notes.append(
                f"{type(made).__name__} steps over one parameter at a time: over flat buffers "
                f"{faults[0]}."
            )
            return made
        return FlatOptimizer(made)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss`; a text-only loss has none if only the projector is
        trained."""
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    def gradient_memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Persistent gradient memory for each of `parameters`: the optimizer's buffers, so that
        nothing is stored twice."""
        flat = self.optimizer.gradient_memory() if isinstance(self.optimizer, FlatOptimizer) else {}
        return [flat[p] if p in flat else torch.zeros_like(p) for p in parameters]

    def reduce_gradients(self) -> None:
        """Sum the gradients over all processes, in float32."""
        gather = self.optimizer.gather if isinstance(self.optimizer, FlatOptimizer) else None
        self.processes.sum_gradients(self.parameters, gather=gather)

    def unscale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""
        if gradients := [p.grad for p in self.parameters if p.grad is not None]:
            torch._foreach_mul_(gradients, factor)

    def clip_gradients(self, max_norm: float | None) -> float:
        """Clip the gradients; every process holds all of them and computes the same norm."""
        return optim.clip_gradients(self.parameters, max_norm)

    def trained_weights(self, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the weights themselves, without copies; None outside the main process."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in also:
                yield name, parameter.detach() if self.processes.is_main else None

    def optimizer_state(self, keep: Keep = as_it_is) -> dict[str, Any] | None:
        """The optimizer's own state; tensors are not copied."""
        return self.optimizer.state_dict() if self.processes.is_main else None

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore the state on this process, after checking shapes and values."""
        check_state(self.optimizer, state)
        optim.load_optimizer(self.optimizer, state)
