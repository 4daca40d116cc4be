"""The decoder of a packed model as two CUDA graphs, one per direction.

A training step of a small model launches thousands of kernels of a few microseconds, and the host
takes longer to launch them than the GPU to run them. A recorded pass is launched at once:

    embeddings, positions, cu_seqlens ──copied──► forward graph ──► hidden states ─► head and loss
    gradients of parameters and embeddings ◄── backward graph ◄──copied── their gradient

Embedding, head and loss stay outside: the number of supervised tokens changes. A graph has a fixed
number of tokens, of sequences (the missing ones are empty) and a bound for the longest; rows are
filled up. One pair of graphs is kept, for the largest row: a second one would need the memory of
all activations again. Before a graph is used, its outputs and gradients are compared with those of
the plain pass on a row that it was not recorded with. They may not differ by more than four times
what two plain passes differ by (on a GPU attention may sum in no fixed order), or `FLOOR`. A fault
turns graphs off and is said; the plain pass goes on.
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
        return Capacity(
            max(self.tokens, other.tokens),
            max(self.sequences, other.sequences),
            max(self.longest, other.longest),
        )


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
    """Records a decoder and replays it.

    Args:
        body: the decoder without its input embedding.
        module: has all parameters that `body` reads.
        parameters: those that are trained, without the input embedding's.
        gradients: gives each of some parameters the memory that its gradient stays in.
        recorder: makes a new recorder, whose graphs share memory.
        autocast: as the decoder is called; a cast weight may not outlive the graph.
        say: told once why no graph is used.

    Attributes:
        graph: the recorded passes, if there are any.
        replays: forward passes that were replayed.
        off: why no graph is used any more; empty otherwise.
    """

    def __init__(
        self,
        body: Body,
        *,
        module: nn.Module,
        parameters: Callable[[], list[nn.Parameter]],
        gradients: Callable[[list[nn.Parameter]], list[Tensor]],
        recorder: Callable[[], Recorder],
        autocast: Callable[[], Any],
        say: Callable[[str], None],
    ):
        self._body, self._module, self._parameters = body, module, parameters
        self._gradients, self._recorder = gradients, recorder
        self._autocast, self._say = autocast, say
        self._seen: Capacity | None = None
        self.graph: Graph | None = None
        self.replays = 0
        self.off = ""

    def filling(self, tokens: int) -> tuple[int | None, int | None]:
        """To how many tokens a row of `tokens` is filled up, by sequences of how many at most; None
        for no rule."""
        if self.off:
            return None, None
        if self.graph is None:
            return rounded(tokens), None
        size = self.graph.capacity
        return max(size.tokens, rounded(tokens)), size.longest

    def __call__(self, row: Row) -> Tensor | None:
        """Hidden states ``[1, N, H]``; None where the plain pass has to be taken."""
        if self.off:
            return None
        graph = self._graph_for(row)
        if graph is None:
            return None
        if graph.waiting() is not None:
            self._turn_off("a row is computed before the gradients of the one before it")
            return None
        graph.load(row)
        self.replays += 1
        anchor = graph.hidden.new_empty(0).requires_grad_()
        return _Replay.apply(row.embeddings, anchor, graph)  # type: ignore[no-untyped-call, no-any-return]

    def _graph_for(self, row: Row) -> Graph | None:
        """The graph if it takes `row`, or a new one; None for the first row, and while there are
        gradients of this step, whose memory a comparison would overwrite."""
        size, graph = row.capacity, self.graph
        if graph is not None and graph.capacity.holds(size) and not graph.moved():
            return graph
        first = self._seen is None
        wanted = Capacity.of(size.tokens, size.sequences, size.longest)
        self._seen = wanted if self._seen is None else wanted.joined(self._seen)
        self.graph = graph = None
        _give_back_memory()  # of the graph, for a plain pass needs as much
        gathering = any(parameter.grad is not None for parameter in self._parameters())
        if first or gathering or self._seen.tokens != size.tokens:
            return None
        self.graph, fault = self._recorded(row, self._seen)
        if fault:
            self._turn_off(fault)
        return self.graph

    def _turn_off(self, why: str) -> None:
        self.graph, self.off = None, why
        _give_back_memory()
        self._say(f"CUDA graphs are not used: {why}")

    def _recorded(self, row: Row, capacity: Capacity) -> tuple[Graph | None, str]:
        """A new graph, compared with the plain pass; or why it cannot be used."""
        try:
            with _random_state_kept(row.embeddings.device), torch.enable_grad():
                graph, fault = self._compared(row, capacity)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return None, _reason(error)
        return (None if fault else graph), fault

    def _compared(self, row: Row, capacity: Capacity) -> tuple[Graph, str]:
        parameters = self._parameters()
        draw = torch.Generator(row.embeddings.device).manual_seed(0)
        like = row.embeddings
        grad = torch.randn(like.shape, generator=draw, device=like.device, dtype=torch.float32)
        hidden, gradients = self._plain(row, grad, parameters)
        wanted = _kept(gradients)
        again, gradients = self._plain(row, grad, parameters)
        noise = (_distance([again], [hidden]), _distance(gradients, wanted))
        del again, gradients
        reached = [g is not None for g in wanted[: len(parameters)]]
        used = [p for p, there in zip(parameters, reached, strict=True) if there]
        graph = self._record(row, capacity, used)
        graph.load(row)
        with _seeded(row.embeddings.device):
            graph.forward()
            graph.grad_hidden.copy_(grad)
            for gradient in graph.gradients:
                gradient.zero_()
            graph.backward()
        gathered = iter(graph.gradients)
        found = [next(gathered) if there else None for there in reached]
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
        aliases = _aliases(parameters)
        leaves: list[Tensor] = list(aliases)
        embeddings = row.embeddings.detach()
        if row.embeddings.requires_grad:
            leaves.append(embeddings.requires_grad_())
        ends = row.cu_seqlens.to(embeddings.device, torch.int32)
        device = embeddings.device
        with self._autocast(), _seeded(device), _swapped(self._module, parameters, aliases):
            hidden = self._body(embeddings, row.positions, ends, row.longest)
            torch.autograd.backward([hidden], [grad.to(hidden.dtype)], inputs=leaves)
        return hidden.detach(), [leaf.grad for leaf in leaves]

    def _record(self, row: Row, capacity: Capacity, parameters: list[nn.Parameter]) -> Graph:
        """Record with a row of zeros, whose sequences have `longest` tokens."""
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
            aliases=_aliases(parameters),
            gradients=self._gradients(parameters),
            grad_embeddings=torch.zeros_like(like) if needed else None,
        )
        graph.embeddings.grad = graph.grad_embeddings
        for alias, gradient in zip(graph.aliases, graph.gradients, strict=True):
            alias.grad = gradient
        recorder, passes = self._recorder(), _Passes(graph, self._body, self._module)
        with self._autocast():
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
        return _swapped(self._module, self._graph.parameters, self._graph.aliases)

    def forward(self) -> Tensor:
        """Hidden states of what is loaded."""
        graph = self._graph
        with self._swapped():
            self._hidden = self._body(
                graph.embeddings, graph.positions, graph.cu_seqlens, graph.capacity.longest
            )
        return self._hidden.detach()

    def backward(self) -> Tensor:
        """Add to the gradients, and replace that of the embeddings."""
        hidden, self._hidden, graph = self._hidden, None, self._graph
        assert hidden is not None
        if graph.grad_embeddings is not None:
            graph.grad_embeddings.zero_()
        with self._swapped():  # recomputation reads weights, too
            grad = graph.grad_hidden.to(hidden.dtype)
            torch.autograd.backward([hidden], [grad], inputs=self._leaves)
        return graph.grad_hidden  # type: ignore[no-any-return]


def _aliases(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """New leaves that share the memory of `parameters`: their gradients and the streams that these
    gather on are their own."""
    return [nn.Parameter(parameter.detach()) for parameter in parameters]


@contextmanager
def _swapped(
    module: nn.Module, parameters: Sequence[nn.Parameter], others: Sequence[nn.Parameter]
) -> Iterator[None]:
    """Let `module` compute with `others` in place of `parameters`."""
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


def _give_back_memory() -> None:
    """Give the GPU what torch holds and nothing uses: the memory of a graph that is gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
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
