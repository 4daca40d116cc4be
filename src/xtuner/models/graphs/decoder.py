"""Replays a decoder where it can; see `xtuner.models.graphs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.kernels.cuda_graphs import Recorder
from xtuner.models.graphs.capacity import Capacity, Row, rounded
from xtuner.models.graphs.comparison import PlainPasses, random_state_kept
from xtuner.models.graphs.graph import Body, Graph, Replay, record


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
        return Replay.apply(row.embeddings, anchor, graph)  # type: ignore[no-untyped-call, no-any-return]

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
            with random_state_kept(row.embeddings.device), torch.enable_grad():
                parts = self._body, self._module, row
                plain = PlainPasses(*parts, self._parameters(), self._autocast)
                graph = record(
                    *parts,
                    capacity=capacity,
                    parameters=plain.used,
                    gradients=self._gradients(plain.used),
                    recorder=self._recorder(),
                    autocast=self._autocast,
                )
                fault = plain.fault_of(graph)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return None, _reason(error)
        return (None if fault else graph), fault


def _give_back_memory() -> None:
    """Give the GPU what torch holds and nothing uses: the memory of a graph that is gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "the memory of the GPU is short"
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"the model cannot be recorded ({type(error).__name__}: {first})"
