"""Describes what each process of a run holds: weights, gradients, optimizer state, activations."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner.engine.strategies.base import BaseStrategy


def holdings(
    strategy: BaseStrategy, *, weights: int, gradients: int, optimizer: int
) -> Iterator[str]:
    """Yield lines on what one of several processes holds; nothing if each holds everything.

    Args:
        strategy: A prepared strategy.
        weights: Bytes of all weights.
        gradients: Bytes of all gradients.
        optimizer: Forecast bytes of all optimizer state; 0 if unknown.
    """
    count, name = strategy.processes.world_size, strategy.settings.strategy
    if count == 1 and name == "replicated":
        return
    shares = strategy.division(strategy.settings, count)
    where = " (in CPU memory)"
    parts = [
        f"weights {_part(strategy.held_weights(), weights)}{where * shares.weights_on_cpu}",
        f"gradients {_part(gradients * shares.gradients, gradients)}",
        f"optimizer {_part(optimizer * shares.optimizer, optimizer)}"
        f"{where * shares.optimizer_on_cpu}",
    ]
    yield (
        f"Strategy     {name}: {'the process' if count == 1 else f'each of {count} processes'} "
        f"holds {', '.join(parts)}, and the activations of its own rows"
    )


def _part(held: float, everything: int) -> str:
    """The bytes that are held and the total."""
    if not everything:
        return "unknown"
    return f"{held / 2**20:,.1f} of {everything / 2**20:,.1f} MiB"
