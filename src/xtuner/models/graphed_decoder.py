"""The decoder of a packed model as two CUDA graphs, one per direction.

A training step of a small model launches thousands of kernels of a few microseconds, and the host
takes longer to launch them than the GPU to run them. A recorded pass is launched at once:

    embeddings, positions, cu_seqlens ──copied──► forward graph ──► hidden states ─► head and loss
    gradients of parameters and embeddings ◄── backward graph ◄──copied── their gradient

Embedding, head and loss stay outside: the number of supervised tokens changes. A graph has a fixed
number of tokens, of sequences (the missing ones are empty) and a bound for the longest; rows are
filled up. Before a graph is used, its outputs and gradients are compared with those of the plain
pass on a row that it was not recorded with. The difference may not be larger than between two plain
passes, which on a GPU may differ (attention sums in no fixed order). A fault turns graphs off and
is said; the plain pass goes on.
"""

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

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.kernels.cuda_graphs import Recorder

Body = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Hidden states ``[1, N, H]`` of embeddings ``[1, N, H]``, position ids ``[1, N]``, cu_seqlens
``[S + 1]`` and the length of the longest sequence."""

MOST_GRAPHS = 2
"""Different numbers of tokens that are recorded; rows of others take the plain pass."""

FLOOR = 1e-3
"""Relative difference of gradients that is never a fault: some hundred roundings of 16 bits, added
up. A row read from stale memory differs by about 1."""


@dataclass(frozen=True)
class Capacity:
    """What a graph takes: exactly `tokens`, at most `sequences`, none over `longest`."""

    tokens: int
    sequences: int
    longest: int

    @classmethod
    def of(cls, tokens: int, sequences: int, longest: int) -> Capacity:
        """The capacity to record for a row: the next powers of two, so that few are recorded."""
        return cls(tokens, max(8, _power(sequences)), min(tokens, max(128, _power(longest))))

    def holds(self, other: Capacity) -> bool:
        """Whether a row of `other`'s numbers fits."""
        fits = self.sequences >= other.sequences and self.longest >= other.longest
        return fits and self.tokens == other.tokens

    def joined(self, other: Capacity) -> Capacity:
        """The smallest that holds both."""
        longest = max(self.longest, other.longest)
        return Capacity(self.tokens, max(self.sequences, other.sequences), longest)


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def rounded(tokens: int) -> int:
    """The number of tokens that a row of `tokens` is filled up to: at most a sixteenth more."""
    step = max(64, 1 << max(0, tokens.bit_length() - 5))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Row:
    """A row for the decoder.

    Attributes:
        embeddings: ``[1, N, H]``.
        positions: int64 ``[1, N]``.
        cu_seqlens: int32 ``[S + 1]``, on the CPU.
        longest: length of the longest sequence.
    """

    embeddings: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    longest: int

    @property
    def capacity(self) -> Capacity:
        """What a graph must take for this row."""
        return Capacity(self.embeddings.shape[1], len(self.cu_seqlens) - 1, self.longest)


@dataclass(eq=False)
class Graph:
    """A recorded pair of passes and the memory that it reads and writes."""

    capacity: Capacity
    embeddings: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    grad_hidden: Tensor
    parameters: list[nn.Parameter]
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
        """Let gradients gather in the memory of the graph: it adds to what is there."""
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
        """Whether a trained parameter is in other memory than when the graph was recorded."""
        return [p.data_ptr() for p in self.parameters] != self.addresses


class _Token:
    """Lives as long as a forward pass that may still be followed by its backward pass."""


class _Replay(torch.autograd.Function):
    """The passes of a graph; parameters get their gradients in place, not through autograd."""

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
        graph: Graph = ctx.graph
        graph.grad_hidden.copy_(grads[0])
        graph.attach()
        graph.backward()
        graph.waiting = lambda: None
        wanted = ctx.needs_input_grad[0] and graph.grad_embeddings is not None
        return (graph.grad_embeddings.clone() if wanted else None), None, None  # type: ignore[union-attr]


class GraphedDecoder:
    """Records a decoder where rows of one size come again, and replays it.

    Args:
        body: the decoder without its input embedding.
        parameters: those of the decoder that are trained, without the input embedding's.
        gradients: gives each of some parameters the memory that its gradient stays in.
        recorder: records.
        autocast: as the decoder is called; a cast weight may not outlive the graph.
        say: told once why no graph is used.
    """

    def __init__(
        self,
        body: Body,
        *,
        parameters: Callable[[], list[nn.Parameter]],
        gradients: Callable[[list[nn.Parameter]], list[Tensor]],
        recorder: Recorder,
        autocast: Callable[[], Any],
        say: Callable[[str], None],
    ):
        self._body, self._parameters, self._gradients = body, parameters, gradients
        self._recorder, self._autocast, self._say = recorder, autocast, say
        self._seen: dict[int, Capacity] = {}
        self.graphs: dict[int, Graph] = {}
        self.replays = 0
        self.off = ""

    def __call__(self, row: Row) -> Tensor | None:
        """Hidden states ``[1, N, H]``; None where the plain pass has to be taken."""
        if self.off:
            return None
        graph = self._graph_for(row)
        if graph is None or graph.waiting() is not None:
            return None  # of a row before this one, gradients are still to come
        graph.load(row)
        self.replays += 1
        anchor = graph.hidden.new_empty(0).requires_grad_()
        return _Replay.apply(row.embeddings, anchor, graph)  # type: ignore[no-untyped-call, no-any-return]

    def _graph_for(self, row: Row) -> Graph | None:
        size = row.capacity
        graph = self.graphs.get(size.tokens)
        if graph is not None and graph.capacity.holds(size) and not graph.moved():
            return graph
        before = self._seen.get(size.tokens)
        wanted = Capacity.of(size.tokens, size.sequences, size.longest)
        self._seen[size.tokens] = wanted.joined(before) if before else wanted
        full = len(self.graphs) >= MOST_GRAPHS and size.tokens not in self.graphs
        if before is None or full or any(p.grad is not None for p in self._parameters()):
            return None  # a row of a new size, or gradients that a comparison would disturb
        self.graphs.pop(size.tokens, None)
        del graph
        return self._recorded(row, self._seen[size.tokens])

    def _recorded(self, row: Row, capacity: Capacity) -> Graph | None:
        """A new graph, compared with the plain pass; None if it cannot be used."""
        try:
            with _random_state_kept(row.embeddings.device):
                graph, fault = self._compared(row, capacity)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            graph, fault = None, _reason(error)
        for parameter in self._parameters():
            parameter.grad = None
        if fault or graph is None:
            self.graphs.clear()
            self.off = fault
            self._say(f"CUDA graphs are not used: {fault}")
            return None
        self.graphs[capacity.tokens] = graph
        return graph

    def _compared(self, row: Row, capacity: Capacity) -> tuple[Graph, str]:
        parameters = self._parameters()
        draw = torch.Generator(row.embeddings.device).manual_seed(0)
        like = row.embeddings
        grad = torch.randn(like.shape, generator=draw, device=like.device, dtype=torch.float32)
        with self._autocast():
            hidden, gradients = self._plain(row, grad, parameters)
            wanted = _kept(gradients)
            again, gradients = self._plain(row, grad, parameters)
            noise = (_distance([again], [hidden]), _distance(gradients, wanted))
        del again, gradients
        used = [p for p, g in zip(parameters, wanted, strict=False) if g is not None]
        graph = self._record(row, capacity, used)
        graph.load(row)
        with _seeded(row.embeddings.device):
            graph.forward()
            graph.grad_hidden.copy_(grad)
            graph.attach()
            graph.backward()
        found = [p.grad for p in parameters]
        if graph.grad_embeddings is not None:
            found.append(graph.grad_embeddings)
        apart = (_distance([graph.hidden], [hidden]), _distance(found, wanted))
        for what, off, allowed in zip(("outputs", "gradients"), apart, noise, strict=True):
            if not off <= max(4 * allowed, FLOOR):
                return graph, f"replayed {what} differ from computed ones by {off:.2g}"
        return graph, ""

    def _plain(
        self, row: Row, grad: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Hidden states and gradients of the plain pass."""
        needed = row.embeddings.requires_grad
        embeddings = row.embeddings.detach().requires_grad_(needed)
        ends = row.cu_seqlens.to(embeddings.device, torch.int32)
        leaves: list[Tensor] = [*parameters, *([embeddings] if needed else [])]
        with _seeded(embeddings.device):
            hidden = self._body(embeddings, row.positions, ends, row.longest)
            torch.autograd.backward([hidden], [grad.to(hidden.dtype)], inputs=leaves)
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return hidden.detach(), gradients

    def _record(self, row: Row, capacity: Capacity, parameters: list[nn.Parameter]) -> Graph:
        """Record with a row of one sequence per `longest` tokens, of zeros."""
        like, device = row.embeddings, row.embeddings.device
        needed = like.requires_grad
        ends = torch.arange(capacity.sequences + 1, dtype=torch.int32) * capacity.longest
        graph = Graph(
            capacity=capacity,
            embeddings=torch.zeros_like(like.detach()).requires_grad_(needed),
            positions=torch.zeros_like(row.positions),
            cu_seqlens=ends.clamp(max=capacity.tokens).to(device),
            grad_hidden=torch.zeros_like(like.detach()),
            parameters=parameters,
            gradients=self._gradients(parameters),
            grad_embeddings=torch.zeros_like(like.detach()) if needed else None,
        )
        live: dict[str, Tensor] = {}
        leaves: list[Tensor] = [*parameters, *([graph.embeddings] if needed else [])]

        def forward() -> Tensor:
            live["hidden"] = self._body(
                graph.embeddings, graph.positions, graph.cu_seqlens, capacity.longest
            )
            return live["hidden"].detach()

        def backward() -> Tensor:
            if graph.grad_embeddings is not None:
                graph.grad_embeddings.zero_()
            grad = graph.grad_hidden.to(live["hidden"].dtype)
            torch.autograd.backward([live.pop("hidden")], [grad], inputs=leaves)
            return graph.grad_hidden

        graph.attach()
        graph.embeddings.grad = graph.grad_embeddings
        with self._autocast():
            graph.hidden, graph.forward = self._recorder.record(forward)
            _, graph.backward = self._recorder.record(backward)
        graph.addresses = [p.data_ptr() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return graph


def _kept(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """`gradients` on the CPU: a comparison is not to need more of the GPU's memory than a step."""
    return [None if g is None else g.to("cpu", copy=True) for g in gradients]


def _distance(found: Sequence[Tensor | None], wanted: Sequence[Tensor | None]) -> float:
    """Norm of the difference over the norm of `wanted`, compared one by one; infinite where only
    one is there or a number is not finite."""
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


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return "the memory of the GPU is short"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"the model cannot be recorded ({type(error).__name__}: {first})"


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers, for dropout, in each pass that is compared."""
    if device.type == "cuda":
        torch.cuda.manual_seed(0)
    yield


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Leave the random state of the GPU as it was."""
    if device.type != "cuda":
        yield
        return
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)
