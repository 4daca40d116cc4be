"""What each process of a run holds: weights, gradients, optimizer state and activations."""

from __future__ import annotations

from collections.abc import Iterator

from xtuner.engine.strategies.base import BaseStrategy


def holdings(
    strategy: BaseStrategy, *, weights: int, gradients: int, optimizer: int
) -> Iterator[str]:
    """Yield what one of several processes holds; nothing for one that holds all.

    Args:
        strategy: prepared.
        weights: bytes of all weights.
        gradients: bytes of all gradients.
        optimizer: bytes of all optimizer state, as forecast; 0 if unknown.
    """
    count, name = strategy.processes.world_size, strategy.settings.strategy
    if count == 1 and name == "replicated":
        return
    shares = strategy.division(strategy.settings, count)
    where = " (in the CPU's memory)"
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
    """Bytes that are held, of how many."""
    if not everything:
        return "unknown"
    return f"{held / 2**20:,.1f} of {everything / 2**20:,.1f} MiB"
