"""Checks the loss and the count that an algorithm, possibly a user's own, returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtuner.errors import ConfigError
from xtuner.types import Algorithm, Batch, LossOutput


def checked_loss(algorithm: Algorithm, model: Any, batch: Batch) -> LossOutput:
    """Return the checked result of `algorithm.loss(model, batch)`.

    Raises:
        ConfigError: The result is not a `LossOutput` with a scalar loss and the metrics that the
            algorithm declares.
    """
    output: Any = algorithm.loss(model, batch)
    name = f"{type(algorithm).__name__}.loss"
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"{name} returned a {type(output).__name__}; it must return an "
            f"xtuner.types.LossOutput(loss, metrics) whose values are sums over the batch"
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
    return output


def checked_count(algorithm: Algorithm, batch: Batch) -> float:
    """Return the checked result of `algorithm.count(batch)`.

    Raises:
        ConfigError: It is not a number, or negative.
    """
    count: Any = algorithm.count(batch)
    if isinstance(count, Tensor) and count.numel() == 1:
        count = count.item()
    if isinstance(count, bool) or not isinstance(count, int | float) or not count >= 0:
        raise ConfigError(
            f"{type(algorithm).__name__}.count returned {count!r:.100}; it must return a number, "
            "0 or more: what the batch adds to the divisor of the loss"
        )
    return float(count)
