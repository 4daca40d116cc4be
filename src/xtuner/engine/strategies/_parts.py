"""What sharding strategies share: the units of a model, norms over shards, and error checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from xtuner.errors import TrainingError
from xtuner.parallel.processes import Processes


def units_of(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights are gathered together: the layers of the decoder and of a vision tower,
    and each module outside them that has its own weights. Each is called through `__call__`. A
    weight that several modules share, such as tied embeddings, is in no unit: `model` itself
    gathers it.
    """
    layers = [
        layer
        for holder in _outermost_lists(model)
        for layer in holder
        if any(True for _ in layer.parameters())
    ]
    inside = {id(module) for layer in layers for module in layer.modules()}
    shared = _shared_weights(model)
    alone: list[nn.Module] = []
    for module in model.modules():
        own = [id(p) for p in module.parameters(recurse=False)]
        if id(module) in inside or not own or shared.intersection(own):
            continue
        alone.append(module)
        inside |= {id(inner) for inner in module.modules()}
    return [*layers, *alone]


def _shared_weights(model: nn.Module) -> set[int]:
    """Weights that several modules share."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def _outermost_lists(module: nn.Module) -> Iterable[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def norm_of_parts(parts: Sequence[Tensor], processes: Processes) -> float:
    """The norm over the shards of all processes; each element is in exactly one shard."""
    norm = nn.utils.get_total_norm(parts) if parts else torch.zeros(())
    (square,) = processes.sum([float(norm) ** 2])
    return float(square**0.5)


def scale_to(parts: Sequence[Tensor], max_norm: float | None, norm: float) -> None:
    """Scale `parts`, whose norm is `norm`, to a norm of at most `max_norm`."""
    if max_norm is not None and norm > max_norm and parts:
        torch._foreach_mul_(list(parts), max_norm / (norm + 1e-6))


def check_has_gradient(loss: Tensor, processes: Processes, name: str) -> bool:
    """Whether `loss` depends on a trained weight.

    Raises:
        TrainingError: It does not, and the other processes wait for its gradients.
    """
    if not loss.requires_grad and processes.world_size > 1:
        raise TrainingError(
            f"process {processes.rank}: the loss of a micro-batch does not depend on any trained "
            f"weight, and with strategy = {name!r} every backward pass needs all processes; set "
            f"strategy = 'replicated'"
        )
    return loss.requires_grad
