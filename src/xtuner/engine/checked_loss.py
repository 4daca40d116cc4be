"""The loss of an algorithm, which may be a user's own code, checked before it is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xtuner.errors import ConfigError
from xtuner.types import Algorithm, Batch, LossOutput


def checked_loss(algorithm: Algorithm, model: Any, batch: Batch) -> LossOutput:
    """What `algorithm.loss` returns for `batch`.

    Raises:
        ConfigError: it is no `LossOutput` with a scalar loss and the metrics that the algorithm
            declares.
    """
    output: Any = algorithm.loss(model, batch)
    name = f"{type(algorithm).__name__}.loss"
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"{name} returned a {type(output).__name__}; it must return LossOutput(loss, metrics) "
            "of xtuner.types, with sums over the batch"
        )
    declared = {name: output.metrics.get(name) for name in algorithm.metrics}
    for what, value in {"loss": output.loss, **declared}.items():
        if value is None:
            there = ", ".join(output.metrics) or "none"
            raise ConfigError(
                f"{name} returned no metric {what!r}, which `metrics` declares; it returned: "
                f"{there}. Return it, or take it out of `metrics`"
            )
        if not isinstance(value, Tensor) or value.numel() != 1 or value.ndim:
            seen = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
            raise ConfigError(f"{name}: {what} is {seen}; it must be a tensor of one number, a sum")
    return output
