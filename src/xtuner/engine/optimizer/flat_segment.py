"""Parameters as views of one buffer, with their gradients collected in another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.engine.optimizer.flat_state import slot
from xtuner.errors import TrainingError


@dataclass(eq=False)
class Segment:
    """Parameters that are contiguous in one buffer and stepped as one tensor.

    Attributes:
        parameters: Parameters of the model.
        indices: Their indices in the optimizer's `state_dict`.
        flat: The tensor that the optimizer steps: the buffer, or the parameter itself if it is the
            only one.
        kept: Persistent memory for the gradients, if something writes to it; see `gradients`.
    """

    parameters: list[nn.Parameter]
    indices: list[int]
    flat: nn.Parameter
    kept: Tensor | None = None

    @classmethod
    def of(cls, parameters: list[nn.Parameter], indices: list[int]) -> Segment:
        """Move `parameters` into a new buffer; a single one is not moved."""
        if len(parameters) == 1:
            return cls(parameters, indices, parameters[0])
        total = sum(slot(p.numel()) for p in parameters)
        flat = torch.zeros(total, dtype=parameters[0].dtype, device=parameters[0].device)
        segment = cls(parameters, indices, nn.Parameter(flat, requires_grad=False))
        segment.attach()
        return segment

    @property
    def shared(self) -> bool:
        """Whether the segment has a buffer."""
        return self.flat is not self.parameters[0]

    def starts(self) -> list[int]:
        """The offset of each parameter, and the length of the buffer."""
        return [0, *accumulate(slot(p.numel()) for p in self.parameters)]

    def attach(self) -> None:
        """Make every parameter whose `data` was replaced a view of the buffer again.

        Raises:
            TrainingError: Its dtype, size or device has changed.
        """
        first, size = self.flat.data_ptr(), self.flat.element_size()
        for parameter, start in zip(self.parameters, self.starts(), strict=False):
            if parameter.data_ptr() == first + start * size:
                continue
            if (parameter.dtype, parameter.device) != (self.flat.dtype, self.flat.device):
                raise TrainingError(
                    f"a trained parameter of shape {tuple(parameter.shape)} was {self.flat.dtype} "
                    f"on {self.flat.device} when the run began and is {parameter.dtype} on "
                    f"{parameter.device} now: change a model before the run, not in a hook"
                )
            view = self.flat.data[start : start + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.data)
            parameter.data = view

    def marks(self) -> list[int]:
        """One mark per parameter: 0 without a gradient, 1 with one, or a unique number if the
        gradient cannot be in the buffer."""
        marks = []
        for index, parameter in enumerate(self.parameters):
            grad = parameter.grad
            fits = grad is None or (grad.layout == torch.strided and grad.dtype == self.flat.dtype)
            marks.append(int(grad is not None) if fits else index + 2)
        return marks

    def gradients(self) -> list[Tensor]:
        """Persistent memory for each parameter's gradient, which then is not copied."""
        if self.kept is None:
            self.kept = torch.zeros_like(self.flat.data)
        return list(self._views(self.kept))

    def _views(self, buffer: Tensor) -> Iterator[Tensor]:
        for parameter, start in zip(self.parameters, self.starts(), strict=False):
            yield buffer[start : start + parameter.numel()].view(parameter.shape)

    def gather(self) -> None:
        """Copy the gradients (all parameters have one, or none has) into one buffer and make them
        views of it."""
        if self.parameters[0].grad is None:
            self.flat.grad = None
            return
        if self.kept is not None and all(
            p.grad is not None and p.grad.data_ptr() == view.data_ptr()
            for p, view in zip(self.parameters, self._views(self.kept), strict=True)
        ):
            self.flat.grad = self.kept
            return
        pieces: list[Tensor] = []
        for parameter in self.parameters:
            assert parameter.grad is not None
            pieces.append(parameter.grad.reshape(-1))
            if missing := slot(parameter.numel()) - parameter.numel():
                pieces.append(self.flat.new_zeros(missing))
        flat_grad = torch.cat(pieces)
        self.flat.grad = flat_grad
        for parameter, view in zip(self.parameters, self._views(flat_grad), strict=True):
            parameter.grad = view

    def split(self, marks: Sequence[Any]) -> Iterator[tuple[Segment, int]]:
        """Segments of neighbours with equal `marks`, each with its offset in this buffer."""
        starts = self.starts()
        for _, run in groupby(range(len(marks)), key=lambda i: marks[i]):
            indices = list(run)
            low, high = indices[0], indices[-1] + 1
            parameters = self.parameters[low:high]
            data = self.flat.data[starts[low] : starts[high]]
            alone = len(parameters) == 1
            flat = parameters[0] if alone else nn.Parameter(data, requires_grad=False)
            yield Segment(parameters, self.indices[low:high], flat), starts[low]
