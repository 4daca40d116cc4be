"""What the trainer asks of a strategy: everything that depends on where weights, gradients and
optimizer state are.

    prepare ─► for each step: zero_grad ─► backward, one per micro-batch ─► reduce_gradients
            ─► unscale ─► clip_gradients ─► step
            ─► for each checkpoint: trained_weights, optimizer_state

All processes make these calls in the same order. The trainer keeps the policy: the divisor of the
loss, the learning rate, the scale of the loss and when a step is repeated or not taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.parallel.processes import Processes

MakeOptimizer = Callable[[nn.Module], Any]
"""Makes the optimizer of a run for the trainable parameters of a model."""


class BaseStrategy(ABC):
    """Holds the model and the optimizer of a run.

    Args:
        settings: of the run.
        processes: this process and the others.

    Attributes:
        sharded: a process does not hold all weights, so a forward pass is a collective call: all
            processes make equally many of them.
        model: what the algorithm calls; set by `prepare`, which may wrap or change it.
        notes: what the user should know of what `prepare` chose.
    """

    sharded: ClassVar[bool] = False

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings = settings
        self.processes = processes
        self.model: Any = None
        self.notes: list[str] = []

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for every setting that the strategy cannot work with."""
        if cls.sharded and settings.has_vision:
            yield "visual_encoder_name_or_path", "sharded weights do not work with images yet"

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Take `model`, whose weights are the same on every process, and make its optimizer.

        Returns:
            The optimizer, with `param_groups` whose ``lr`` takes effect in the next step.
        """

    @abstractmethod
    def zero_grad(self) -> None:
        """Discard all gradients."""

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss` to those of the step.

        Args:
            loss: of one micro-batch; without a gradient where it depends on nothing that is
                trained.
            last: no other micro-batch of this process follows in the step.
        """

    def gradient_memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """For each of `parameters` memory that its gradient may stay in from step to step, so that
        a CUDA graph can write there."""
        return [torch.zeros_like(parameter) for parameter in parameters]

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum the gradients over all processes; called once after the last micro-batch, also by a
        process that had none."""

    @abstractmethod
    def unscale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""

    @abstractmethod
    def clip_gradients(self, max_norm: float | None) -> float:
        """Scale the gradients down to `max_norm` (None: leave them).

        Returns:
            Their norm before that, over all parameters: the same on every process.
        """

    @abstractmethod
    def step(self) -> None:
        """Apply the gradients."""

    @abstractmethod
    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""

    @abstractmethod
    def trained_weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yield each trained weight of the model given to `prepare` by name, gathered, one by one.

        Every process iterates to the end. The tensor is on rank 0; the others may get None. A
        consumer that keeps no tensor holds no second copy of the model.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any] | None:
        """The state of the optimizer in the format of `torch.optim.Optimizer.state_dict`, one entry
        per parameter as on a single process; on rank 0, None elsewhere. A collective call."""

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore what `optimizer_state` gave, of this or of another strategy.

        Args:
            state: the whole state, on every process.

        Raises:
            ValueError: it belongs to other parameters, or its values cannot be an optimizer's.
        """
