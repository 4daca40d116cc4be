"""Replays a decoder if possible; see `xtuner.models.graphs`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.errors import first_line
from xtuner.kernels.cuda_graphs import Recorder
from xtuner.models.graphs.capacity import Capacity, Row, rounded
from xtuner.models.graphs.comparison import PlainPasses, random_state_kept
from xtuner.models.graphs.graph import Body, Graph, Replay, record


class GraphedDecoder:
    """Records a decoder and replays it.

    Args:
        body: The decoder without its input embedding.
        module: Has all parameters that `body` reads.
        parameters: The trained parameters, without the input embedding's.
        gradients: Returns persistent gradient memory for parameters.
        recorder: Creates a recorder, whose graphs share memory.
        autocast: The autocast context of the decoder; cast weights must not outlive the graph.
        report: Called once with the reason if no graph is used.

    Attributes:
        graph: The recorded passes, if any.
        replays: Number of replayed forward passes.
        off: Why graphs are disabled; empty otherwise.
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
        report: Callable[[str], None],
    ):
        self._body, self._module, self._parameters = body, module, parameters
        self._gradients, self._recorder = gradients, recorder
        self._autocast, self._report = autocast, report
        self._seen: Capacity | None = None
        self.graph: Graph | None = None
        self.replays = 0
        self.off = ""

    def filling(self, tokens: int) -> tuple[int | None, int | None]:
        """The padded number of tokens of a row of `tokens`, and the maximum length of padding
        sequences; None without a rule."""
        if self.off:
            return None, None
        if self.graph is None:
            return rounded(tokens), None
        size = self.graph.capacity
        return max(size.tokens, rounded(tokens)), size.longest

    def __call__(self, row: Row) -> Tensor | None:
        """Hidden states ``[1, N, H]``; None if the eager pass must be used."""
        if self.off:
            return None
        graph = self._graph_for(row)
        if graph is None:
            return None
        if graph.waiting() is not None:
            self._turn_off("a forward pass begins before the backward pass of the previous row")
            return None
        graph.load(row)
        self.replays += 1
        anchor = graph.hidden.new_empty(0).requires_grad_()
        return Replay.apply(row.embeddings, anchor, graph)  # type: ignore[no-untyped-call, no-any-return]

    def _graph_for(self, row: Row) -> Graph | None:
        """The graph if it accepts `row`, otherwise a new one; None for the first row, and while
        this step has gradients, whose memory a comparison would overwrite."""
        size, graph = row.capacity, self.graph
        if graph is not None and graph.capacity.holds(size) and not graph.moved():
            return graph
        first = self._seen is None
        wanted = Capacity.of(size.tokens, size.sequences, size.longest)
        self._seen = wanted if self._seen is None else wanted.joined(self._seen)
        self.graph = graph = None
        _give_back_memory()  # of the graph, because an eager pass needs as much
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
        self._report(f"CUDA graphs are not used: {why}")

    def _recorded(self, row: Row, capacity: Capacity) -> tuple[Graph | None, str]:
        """A new graph, compared with the eager pass, or why it cannot be used."""
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
    """Return unused cached memory to the GPU, such as that of a deleted graph."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _reason(error: BaseException) -> str:
    if is_out_of_memory(error):
        return "the GPU has too little memory"
    return f"the model cannot be recorded ({type(error).__name__}: {first_line(error)})"
