"""Compares a recorded pair of passes with eager passes on the same row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.models.graphs.capacity import Row
from xtuner.models.graphs.graph import Body, Graph, aliases_of, swapped

FLOOR = 1e-3
"""Relative difference of gradients that is always accepted: some hundred accumulated 16-bit
roundings. A row read from stale memory differs by about 1."""


class PlainPasses:
    """The results of eager passes on a row, and how much two of them differ.

    Args:
        body: The decoder without its input embedding.
        module: Has all parameters that `body` reads.
        parameters: Parameters that may get gradients.
        autocast: The autocast context of the passes.

    Attributes:
        used: The parameters that got a gradient.
    """

    def __init__(
        self,
        body: Body,
        module: nn.Module,
        row: Row,
        parameters: list[nn.Parameter],
        autocast: Callable[[], Any],
    ) -> None:
        self._body, self._module, self._autocast = body, module, autocast
        self._row, self._parameters = row, parameters
        like = row.embeddings
        draw = torch.Generator(like.device).manual_seed(0)
        self._grad = torch.randn(
            like.shape, generator=draw, device=like.device, dtype=torch.float32
        )
        self._hidden, gradients = self._run()
        # on the CPU: a comparison should not need more GPU memory than a step
        self._gradients = [None if g is None else g.to("cpu", copy=True) for g in gradients]
        again, gradients = self._run()
        self._noise = (
            _distance([again], [self._hidden]),
            _distance(gradients, self._gradients),
        )
        self.used = [p for p, g in zip(parameters, self._gradients, strict=False) if g is not None]

    def fault_of(self, graph: Graph) -> str:
        """How the replay of `graph` differs from the eager passes; empty if it does not."""
        graph.load(self._row)
        with _seeded(self._row.embeddings.device):
            graph.forward()
            graph.grad_hidden.copy_(self._grad)
            for gradient in graph.gradients:
                gradient.zero_()
            graph.backward()
        gathered = dict(zip(map(id, graph.parameters), graph.gradients, strict=True))
        found = [gathered.get(id(parameter)) for parameter in self._parameters]
        if graph.grad_embeddings is not None:
            found.append(graph.grad_embeddings)
        apart = (_distance([graph.hidden], [self._hidden]), _distance(found, self._gradients))
        for what, off, allowed in zip(("outputs", "gradients"), apart, self._noise, strict=True):
            if not off <= max(4 * allowed, FLOOR):
                return f"replayed {what} differ from computed ones by {off:.2g}"
        return ""

    def _run(self) -> tuple[Tensor, list[Tensor | None]]:
        """Hidden states, and the gradients of the parameters and, if needed, of the embeddings."""
        row, aliases = self._row, aliases_of(self._parameters)
        leaves: list[Tensor] = list(aliases)
        embeddings = row.embeddings.detach()
        if row.embeddings.requires_grad:
            leaves.append(embeddings.requires_grad_())
        ends = row.cu_seqlens.to(embeddings.device, torch.int32)
        replaced = swapped(self._module, self._parameters, aliases)
        with self._autocast(), _seeded(embeddings.device), replaced:
            hidden = self._body(embeddings, row.positions, ends, row.longest)
            torch.autograd.backward([hidden], [self._grad.to(hidden.dtype)], inputs=leaves)
        return hidden.detach(), [leaf.grad for leaf in leaves]


def _distance(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """The norm of the difference over the norm of `wanted`, over all tensors together; infinite if
    only one of a pair is missing, or if a number is non-finite."""
    apart, size = 0.0, 0.0
    for a, b in zip(found, wanted, strict=True):
        if a is None or b is None:
            if (a is None) != (b is None):
                return float("inf")
            continue
        reference = b.to(a.device).float()
        apart += float((a.float() - reference).square().sum())
        size += float(reference.square().sum())
    if size == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    ratio = (apart / size) ** 0.5
    return ratio if ratio == ratio else float("inf")


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Use the same random numbers, for dropout, in each pass that is compared."""
    if device.type == "cuda":
        torch.cuda.manual_seed(0)
    yield


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the random state of the GPU."""
    if device.type != "cuda":
        yield
        return
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)
