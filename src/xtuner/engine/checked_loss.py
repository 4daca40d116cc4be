"""Checks the loss and the count that an algorithm, possibly a user's own, returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.errors import ConfigError
from xtuner.types import Algorithm, Batch, LossOutput


def checked_loss(algorithm: Algorithm, model: Any, batch: Batch) -> LossOutput:
    """Return the checked result of `algorithm.loss(model, batch)`.

    Raises:
        ConfigError: The result is not a `LossOutput` with a scalar loss and the metrics that the
            algorithm declares, or the loss of a batch that counts has no gradient.
    """
    with _gradients(model) as reached:
        output: Any = algorithm.loss(model, batch)
    name = f"{type(algorithm).__name__}.loss"
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"{name} returned a {type(output).__name__}; it must return an "
            f"xtuner.types.LossOutput(loss, metrics) whose values are sums over the batch"
        )
    if undeclared := [key for key in output.metrics if key not in algorithm.metrics]:
        raise ConfigError(
            f"{name} returned the metric {undeclared[0]!r}, which `metrics` does not declare, so "
            f"it would not be logged; declare it: metrics = {(*algorithm.metrics, *undeclared)}"
        )
    declared = {name: output.metrics.get(name) for name in algorithm.metrics}
    for what, value in {"loss": output.loss, **declared}.items():
        if value is None:
            returned = ", ".join(output.metrics) or "none"
            raise ConfigError(
                f"{name} returned no metric {what!r}, which `metrics` declares; it returned: "
                f"{returned}. Return it, or remove it from `metrics`"
            )
        if not isinstance(value, Tensor) or value.numel() != 1 or value.ndim:
            seen = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise ConfigError(
                f"{name}: {what} is {seen}; it must be a scalar tensor, a sum over the batch"
            )
    detached = reached and not output.loss.requires_grad and torch.is_grad_enabled()
    if detached and checked_count(algorithm, batch) > 0:  # else there may be nothing to learn
        raise ConfigError(
            f"{name}: the loss has no gradient, although the model's output has; compute it from "
            "that output without detach(), item() or torch.no_grad()"
        )
    return output


@contextmanager
def _gradients(model: Any) -> Iterator[list[bool]]:
    """Yield a list that is not empty once a call of `model` has returned a tensor with a gradient.
    Without images a batch may reach nothing that is trained."""
    reached: list[bool] = []

    def note(_module: Any, _arguments: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            reached.append(True)

    handle = model.register_forward_hook(note) if isinstance(model, nn.Module) else None
    try:
        yield reached
    finally:
        if handle is not None:
            handle.remove()


def checked_count(algorithm: Algorithm, batch: Batch) -> float:
    """Return the checked result of `algorithm.count(batch)`.

    Raises:
        ConfigError: It is not a number, or negative.
    """
    count: Any = algorithm.count(batch)
    number = as_number(count)
    if number is None or isinstance(number, bool) or not number >= 0:
        raise ConfigError(
            f"{type(algorithm).__name__}.count returned {count!r:.100}; it must return a number, "
            "0 or more: what the batch adds to the divisor of the loss"
        )
    return float(number)


def as_number(value: Any) -> float | bool | None:
    """The float or bool that `value` is, possibly of NumPy or as a tensor of one element; None if
    it is something else."""
    try:
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, bool):
            return plain
        return None if isinstance(plain, str | bytes) else float(plain)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
