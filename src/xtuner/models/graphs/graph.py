"""A recorded pair of decoder passes, and their replay in autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xtuner.kernels.cuda_graphs import Recorder
from xtuner.models.graphs.capacity import Capacity, Row

Body = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Hidden states ``[1, N, H]`` of embeddings ``[1, N, H]``, position ids ``[1, N]``, cu_seqlens
``[S + 1]`` and the length of the longest sequence."""


@dataclass(eq=False)
class Graph:
    """A recorded pair of passes, with the memory that it reads and writes."""

    capacity: Capacity
    embeddings: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    grad_hidden: Tensor
    parameters: list[nn.Parameter]
    aliases: list[nn.Parameter]
    gradients: list[Tensor]
    hidden: Tensor = field(init=False)
    grad_embeddings: Tensor | None = None
    forward: Callable[[], None] = field(init=False)
    backward: Callable[[], None] = field(init=False)
    addresses: list[int] = field(init=False)
    waiting: Callable[[], object | None] = lambda: None

    def load(self, row: Row) -> None:
        """Copy a row into the memory of the graph."""
        missing = len(self.cu_seqlens) - len(row.cu_seqlens)
        ends = F.pad(row.cu_seqlens, (0, missing), value=int(row.cu_seqlens[-1]))
        self.cu_seqlens.copy_(ends, non_blocking=True)
        self.positions.copy_(row.positions, non_blocking=True)
        with torch.no_grad():
            self.embeddings.copy_(row.embeddings)

    def attach(self) -> None:
        """Make gradients accumulate in the graph's memory."""
        fresh = []
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is gradient:
                continue
            if parameter.grad is None:
                fresh.append(gradient)
            else:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        if fresh:
            torch._foreach_zero_(fresh)

    def moved(self) -> bool:
        """Whether a trained parameter has moved in memory since the graph was recorded."""
        return [p.data_ptr() for p in self.parameters] != self.addresses


class _Token:
    """Lives as long as a forward pass whose backward pass may still follow."""


class Replay(torch.autograd.Function):
    """Replays the passes of a graph; parameters get their gradients in place, not through
    autograd."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, anchor: Tensor, graph: Graph) -> Tensor:
        """`graph` is loaded; `anchor` requires a gradient, so that `backward` is called."""
        ctx.graph, ctx.token = graph, _Token()
        graph.waiting = weakref.ref(ctx.token)
        graph.forward()
        return graph.hidden.detach()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        """Replay the backward pass; only the gradient of the embeddings is returned."""
        graph: Graph = ctx.graph
        graph.grad_hidden.copy_(grads[0])
        graph.attach()
        graph.backward()
        graph.waiting = lambda: None
        wanted = ctx.needs_input_grad[0] and graph.grad_embeddings is not None
        return (graph.grad_embeddings.clone() if wanted else None), None, None  # type: ignore[union-attr]


def record(
    body: Body,
    module: nn.Module,
    row: Row,
    *,
    capacity: Capacity,
    parameters: list[nn.Parameter],
    gradients: list[Tensor],
    recorder: Recorder,
    autocast: Callable[[], Any],
) -> Graph:
    """Record `body` with a row of zeros, whose sequences have `capacity.longest` tokens.

    Args:
        body: The decoder without its input embedding.
        module: Has all parameters that `body` reads.
        row: A row with the dtypes and shapes of the graph.
        parameters: Parameters that get gradients.
        gradients: Memory for these gradients.
        recorder: A new recorder.
        autocast: The autocast context of the passes.

    Raises:
        RuntimeError: The passes cannot be recorded.
    """
    like = row.embeddings.detach()
    needed = row.embeddings.requires_grad
    ends = torch.arange(capacity.sequences + 1, dtype=torch.int32) * capacity.longest
    graph = Graph(
        capacity=capacity,
        embeddings=torch.zeros_like(like).requires_grad_(needed),
        positions=torch.zeros_like(row.positions),
        cu_seqlens=ends.clamp(max=capacity.tokens).to(like.device),
        grad_hidden=torch.zeros_like(like),
        parameters=parameters,
        aliases=aliases_of(parameters),
        gradients=gradients,
        grad_embeddings=torch.zeros_like(like) if needed else None,
    )
    graph.embeddings.grad = graph.grad_embeddings
    for alias, gradient in zip(graph.aliases, graph.gradients, strict=True):
        alias.grad = gradient
    passes = _Passes(graph, body, module)
    with autocast():
        graph.hidden, graph.forward = recorder.record(passes.forward)
        _, graph.backward = recorder.record(passes.backward)
    graph.addresses = [p.data_ptr() for p in parameters]
    return graph


class _Passes:
    """The two functions that are recorded for a graph."""

    def __init__(self, graph: Graph, body: Body, module: nn.Module):
        self._graph, self._body, self._module = weakref.proxy(graph), body, module
        self._leaves: list[Tensor] = list(graph.aliases)
        if graph.grad_embeddings is not None:
            self._leaves.append(graph.embeddings)
        self._hidden: Tensor | None = None

    def _swapped(self) -> Any:
        return swapped(self._module, self._graph.parameters, self._graph.aliases)

    def forward(self) -> Tensor:
        """Hidden states of the loaded row."""
        graph = self._graph
        with self._swapped():
            self._hidden = self._body(
                graph.embeddings, graph.positions, graph.cu_seqlens, graph.capacity.longest
            )
        return self._hidden.detach()

    def backward(self) -> Tensor:
        """Accumulate the gradients, and replace the gradient of the embeddings."""
        hidden, self._hidden, graph = self._hidden, None, self._graph
        assert hidden is not None
        if graph.grad_embeddings is not None:
            graph.grad_embeddings.zero_()
        with self._swapped():  # recomputation also reads weights
            grad = graph.grad_hidden.to(hidden.dtype)
            torch.autograd.backward([hidden], [grad], inputs=self._leaves)
        return graph.grad_hidden  # type: ignore[no-any-return]


def aliases_of(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """New leaf tensors that share the memory of `parameters`, with separate gradients and
    accumulation streams."""
    return [nn.Parameter(parameter.detach()) for parameter in parameters]


@contextmanager
def swapped(
    module: nn.Module, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Make `module` compute with `others` instead of `parameters`."""
    new = {id(p): other for p, other in zip(parameters, others, strict=True)}
    changed = [
        (part, name, p)
        for part in module.modules()
        for name, p in part._parameters.items()
        if id(p) in new
    ]
    try:
        for part, name, p in changed:
            part._parameters[name] = new[id(p)]
        yield
    finally:
        for part, name, p in changed:
            part._parameters[name] = p
