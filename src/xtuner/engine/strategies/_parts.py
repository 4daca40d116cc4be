"""What strategies that divide a model share: its units, norms over parts, and what they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from xtuner.errors import TrainingError
from xtuner.parallel.processes import Processes


def units_of(model: nn.Module) -> list[nn.Module]:
    """Modules whose weights are gathered together: the layers of the decoder and of a vision tower,
    and each module outside them that has weights of its own.

    Every one is entered through its own `__call__`. A weight that several modules use, as tied
    embeddings, is in no unit: it is left to `model` itself.
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
    """Weights that several modules have."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def _outermost_lists(module: nn.Module) -> Iterable[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def norm_of_parts(parts: Sequence[Tensor], processes: Processes) -> float:
    """The norm over the parts of all processes; each number is in one of them."""
    norm = nn.utils.get_total_norm(parts) if parts else torch.zeros(())
    (square,) = processes.sum([float(norm) ** 2])
    return float(square**0.5)


def scale_to(parts: Sequence[Tensor], max_norm: float | None, norm: float) -> None:
    """Multiply `parts` so that their norm, `norm` now, is at most `max_norm`."""
    if max_norm is not None and norm > max_norm and parts:
        torch._foreach_mul_(list(parts), max_norm / (norm + 1e-6))


def check_has_gradient(loss: Tensor, processes: Processes, name: str) -> bool:
    """Whether `loss` depends on what is trained.

    Raises:
        TrainingError: it does not, and the other processes wait for its gradients.
    """
    if not loss.requires_grad and processes.world_size > 1:
        raise TrainingError(
            f"process {processes.rank}: the loss of a micro-batch depends on nothing that is "
            f"trained, and with strategy = {name!r} all processes take part in every backward "
            "pass; set strategy = 'replicated'"
        )
    return loss.requires_grad
