"""The interface of a strategy: everything that depends on where weights, gradients and optimizer
state are.

    prepare ─► for each step: zero_grad ─► backward, one per micro-batch ─► reduce_gradients
            ─► unscale ─► clip_gradients ─► step
            ─► for each checkpoint: trained_weights, optimizer_state
            ─► close

All processes make these calls in the same order. The trainer keeps the policy: the loss divisor,
the learning rate, the loss scale, and when a step is repeated or skipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.engine.spill import as_it_is
from xtuner.parallel.processes import Processes
from xtuner.plugins import same_type

MakeOptimizer = Callable[[nn.Module], Any]
"""Creates the run's optimizer for the trainable parameters of a model."""
Keep = Callable[[Tensor], Tensor]
"""Keeps a tensor until a checkpoint is written."""


@dataclass(frozen=True)
class Division:
    """What one process holds, as fractions of the full weights, gradients and optimizer state.

    Attributes:
        weights: Fraction of the model's weights.
        gradients: Fraction of the gradients.
        optimizer: Fraction of the optimizer state.
        master: Fraction of an additional float32 copy of the trained weights.
        gathers: Weights are gathered into memory of their own, on a single process too.
        live: Number of gathered elements that are kept for reuse, in addition to the current and
            the next unit.
        bucket: Number of float32 elements in gradient buffers.
        weights_on_cpu: Weights, gradients and optimizer state are in CPU memory.
        optimizer_on_cpu: The optimizer state is in CPU memory.
    """

    weights: float = 1.0
    gradients: float = 1.0
    optimizer: float = 1.0
    master: float = 0.0
    gathers: bool = False
    live: int = 0
    bucket: int = 0
    weights_on_cpu: bool = False
    optimizer_on_cpu: bool = False


class BaseStrategy(ABC):
    """Holds the model and the optimizer of a run.

    Args:
        settings: The run's settings.
        processes: The process group.

    Attributes:
        sharded: A process does not hold all weights, so a forward pass is a collective call: all
            processes must make the same number of them.
        gathers: A process does not hold all optimizer state, so checkpoints are gathered. True
            whenever `sharded` is.
        lockstep: A backward pass is a collective call: all processes must make the same number of
            them, through the same layers. True whenever `sharded` is.
        returns_from: Size in bytes from which a CPU process returns freed blocks to the system,
            where steps take and free buffers that the heap would keep without reusing them; None
            keeps all.
        options: The strategy's options with their defaults, set by `strategy_options`.
        model: The module that the algorithm calls; set by `prepare`, which may wrap or change it.
        optimizer: Holds the parameter groups; set by `prepare`.
        notes: Notes for the user on what `prepare` chose.
    """

    sharded: ClassVar[bool] = False
    lockstep: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    returns_from: ClassVar[int | None] = None
    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, settings: Settings, processes: Processes) -> None:
        self.settings = settings
        self.processes = processes
        self.option: dict[str, Any] = {**self.options, **dict(settings.strategy_options)}
        self.model: Any = None
        self.optimizer: Any = None
        self.notes: list[str] = []

    @classmethod
    def check(cls, settings: Settings) -> Iterator[tuple[str, str]]:
        """Yield (setting, problem) for every setting that the strategy does not support."""
        for name, value in settings.strategy_options:
            if name not in cls.options:
                allowed = ", ".join(cls.options) or "none"
                yield "strategy_options", f"has no option {name!r}; allowed: {allowed}"
            elif not same_type(value, default := cls.options[name]):
                yield (
                    "strategy_options",
                    f"{name} = {value!r} must have the type of its default, {default!r}",
                )

        if cls.sharded and settings.cache_visual_features:
            yield (
                "cache_visual_features",
                "a sharded vision tower must run on all processes together, but each finds "
                "different features in the cache; set it to False, or strategy = 'deepspeed_zero2'",
            )

    @classmethod
    def division(cls, settings: Settings, processes: int) -> Division:
        """The fractions that each of `processes` processes holds."""
        return Division()

    def optimizer_for(self, optim_type: str) -> str:
        """The optimizer that is used for `optim_type`."""
        return optim_type

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> Any:
        """Prepare `model`, whose weights are the same on every process, and create its optimizer.

        Returns:
            The optimizer; changes to ``lr`` in its `param_groups` take effect in the next step.
        """

    def held_weights(self) -> int:
        """Bytes of weights that this process holds between steps, after `prepare`."""
        return sum(p.nbytes for p in self.model.parameters())

    def zero_grad(self) -> None:
        """Discard all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backpropagate `loss` and accumulate its gradients.

        Args:
            loss: The loss of one micro-batch; without a gradient if it depends on no trained
                weight.
            last: Whether this is the process's last micro-batch in the step.
        """

    def gradient_memory(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Persistent gradient memory for each of `parameters`, which a CUDA graph can write to."""
        return [torch.zeros_like(parameter) for parameter in parameters]

    @abstractmethod
    def reduce_gradients(self) -> None:
        """Sum the gradients over all processes; called once after the last micro-batch, also by
        processes without one."""

    @abstractmethod
    def unscale(self, factor: float) -> None:
        """Multiply all gradients by `factor`."""

    @abstractmethod
    def clip_gradients(self, max_norm: float | None) -> float:
        """Clip the gradients to `max_norm` (None: do not clip).

        Returns:
            The norm over all parameters before clipping, the same on every process.
        """

    def step(self) -> None:
        """Apply the gradients."""
        self.optimizer.step()

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        optim.set_learning_rate(self.optimizer, lr)

    @abstractmethod
    def trained_weights(self, also: Collection[str] = ()) -> Iterator[tuple[str, Tensor | None]]:
        """Yield the name and the gathered tensor of each trained weight, one by one, under its name
        in the model given to `prepare`. Every process must iterate to the end. Rank 0 gets the
        tensor; others may get None. A consumer that keeps no tensor never holds a second copy of
        the model.

        Args:
            also: Names of frozen weights to gather as well.
        """

    @abstractmethod
    def optimizer_state(self, keep: Keep = as_it_is) -> dict[str, Any] | None:
        """The optimizer state in the format of `torch.optim.Optimizer.state_dict`, one entry per
        parameter as on a single process; None outside rank 0. A collective call.

        Args:
            keep: Called with each gathered tensor before the next is gathered; its result is
                stored.
        """

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `optimizer_state` of this or another strategy.

        Args:
            state: The full state, on every process.

        Raises:
            ValueError: It belongs to other parameters, or its values are invalid.
        """

    def close(self) -> None:
        """Release model and optimizer, and what would keep them in memory in a process that goes
        on. Not a collective call; the strategy cannot be used afterwards."""
        self.model = self.optimizer = None
