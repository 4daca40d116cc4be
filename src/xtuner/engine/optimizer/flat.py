"""Optimizer steps over a few flat buffers instead of one launch and one wait per parameter.

bitsandbytes' optimizers launch a kernel for each parameter and wait for it: 448 times per step for
LoRA on a 7B model. Here parameters with up to `LARGEST` elements become views of buffers with up to
`BUFFER` elements, and the optimizer steps over the buffers. The arithmetic is the library's:
updates are elementwise, so a longer tensor gives the same bits (see `flat_state` for 8-bit state).

Gradients stay with the parameters until the step, which copies them into buffers one by one, so no
gradient lives longer than it otherwise would. As in any optimizer, a parameter without a gradient
is not stepped: its buffer is then split permanently into parameters with and without one.

torch's own optimizers step over lists of tensors in few launches and stay as they are. So does
every optimizer on a CPU, where there are no launches and one matrix at a time fits the caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.engine.optimizer.flat_segment import Segment
from xtuner.engine.optimizer.flat_state import joined, kind, part_of, plain, slot
from xtuner.engine.optimizer.optim import load_optimizer

BUFFER = 2**24
"""Maximum elements in a buffer: 64 MiB in float32. Gradients are copied, and paged state is moved,
in pieces of this size."""

LARGEST = 2**22
"""Parameters with more elements keep their own tensor: their step takes longer than its launch."""

ELEMENTWISE = frozenset({"adam", "lion", "rmsprop", "adagrad"})
"""Elementwise update rules of bitsandbytes (`optimizer_name`). LAMB and LARS scale by the
parameter's norm; AdEMAMix has state of another shape."""


class FlatOptimizer:
    """A bitsandbytes optimizer over flat buffers, used like any optimizer. `state_dict` and
    `load_state_dict` use the original parameters, so checkpoints do not depend on buffers.

    Args:
        optimizer: An optimizer for a model's parameters that has not stepped yet; see
            `steps_by_element`.
    """

    def __init__(self, optimizer: Any):
        self.inner = optimizer
        self._small = optimizer.args.min_8bit_size if optimizer.args.optim_bits == 8 else 0
        self._gathered = False
        self.segments: list[list[Segment]] = []
        first = 0
        with torch.no_grad():
            for group in optimizer.param_groups:
                parameters = list(group["params"])
                numbers = range(first, first + len(parameters))
                first += len(parameters)
                # otherwise they would hold their memory until all are moved
                group["params"].clear()
                packed = _packed(parameters, small=self._small)
                segments = [
                    Segment.of([parameters[i] for i in indices], [numbers[i] for i in indices])
                    for indices in packed
                ]
                self.segments.append(segments)
                group["params"].extend(segment.flat for segment in segments)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with buffers as parameters."""
        return self.inner.param_groups  # type: ignore[no-any-return]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None; zeros would still update the moments."""
        if not set_to_none:
            raise NotImplementedError("flat buffers only support set_to_none=True")
        self._gathered = False
        for segment in self._all():
            segment.flat.grad = None
            for parameter in segment.parameters:
                parameter.grad = None

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Collect the gradients in buffers and return all buffers, with or without a gradient. Call
        it after the last backward pass; afterwards the parameters' gradients are views.
        """
        for index in range(len(self.segments)):
            for segment in list(self.segments[index]):
                if segment.shared and len(set(marks := segment.marks())) > 1:
                    self._split(index, segment, marks)
        for segment in filter(lambda segment: segment.shared, self._all()):
            segment.attach()
            segment.gather()
        self._gathered = True
        return [segment.flat for segment in self._all()]

    def gradient_memory(self) -> dict[nn.Parameter, Tensor]:
        """Persistent memory for the gradient of each parameter."""
        memory: dict[nn.Parameter, Tensor] = {}
        for segment in filter(lambda segment: segment.shared, self._all()):
            memory.update(zip(segment.parameters, segment.gradients(), strict=True))
        return memory

    def step(self) -> None:
        """Step all parameters that have a gradient."""
        if not self._gathered:
            self.gather()
        self._init_small_state()
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        """The state per parameter; its tensors are views of the buffers' state."""
        raw = self.inner.state_dict()
        states: dict[int, Any] = {}
        groups = []
        for segments, group in zip(self.segments, raw["param_groups"], strict=True):
            for segment, key in zip(segments, group["params"], strict=True):
                if key not in raw["state"]:
                    continue
                state = raw["state"][key]
                trio = zip(segment.indices, segment.parameters, segment.starts(), strict=False)
                for index, parameter, start in trio:
                    part = part_of(state, start=start, shape=parameter.shape)
                    states[index] = part if segment.shared else state
            numbers = sorted(i for segment in segments for i in segment.indices)
            groups.append({**group, "params": numbers})
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the `state_dict` of this optimizer or of one over the parameters.

        Raises:
            ValueError: It belongs to other parameters.
        """
        counts = [sum(len(s.indices) for s in segments) for segments in self.segments]
        if [len(group["params"]) for group in state["param_groups"]] != counts:
            raise ValueError("the state belongs to an optimizer with other parameters")
        numbers = [i for group in state["param_groups"] for i in group["params"]]
        states = {at: plain(state["state"].get(i, {})) for at, i in enumerate(numbers)}
        flat: list[Any] = []
        groups = []
        for index, saved in enumerate(state["param_groups"]):
            for segment in list(self.segments[index]):
                _check_sizes(segment, states)
                if len(set(marks := [kind(states[i]) for i in segment.indices])) > 1:
                    self._split(index, segment, marks)
            first = len(flat)
            for segment in self.segments[index]:
                own = [states[i] for i in segment.indices]
                flat.append(joined(own) if segment.shared else own[0])
            groups.append({**saved, "params": list(range(first, len(flat)))})
        filled = {key: value for key, value in enumerate(flat) if value}
        load_optimizer(self.inner, {"state": filled, "param_groups": groups})

    def _all(self) -> Iterator[Segment]:
        for segments in self.segments:
            yield from segments

    def _split(self, index: int, segment: Segment, marks: Sequence[Any]) -> None:
        """Split `segment` of group `index` between neighbours with different `marks`."""
        at = next(i for i, other in enumerate(self.segments[index]) if other is segment)
        state = self.inner.state.pop(segment.flat, None)
        segment.flat.grad = None
        parts = list(segment.split(marks))
        for part, start in parts:
            if state:
                shape = part.flat.shape
                self.inner.state[part.flat] = part_of(state, start=start, shape=shape)
        self.segments[index][at : at + 1] = [part for part, _ in parts]
        self.param_groups[index]["params"][at : at + 1] = [part.flat for part, _ in parts]

    def _init_small_state(self) -> None:
        """Give buffers of small parameters the 32-bit state that each parameter would have.
        bitsandbytes uses 8 bits from `min_8bit_size` elements on, which a buffer exceeds.
        """
        if not self._small:
            return
        args = self.inner.args
        for g, segments in enumerate(self.segments):
            for p, segment in enumerate(segments):
                small = segment.parameters[0].numel() < self._small and segment.shared
                if small and segment.flat.grad is not None and not self.inner.state[segment.flat]:
                    args.optim_bits = 32
                    try:
                        self.inner.init_state(self.param_groups[g], segment.flat, g, p)
                    finally:
                        args.optim_bits = 8


def steps_by_element(optimizer: Any) -> bool:
    """Whether `optimizer` is a bitsandbytes optimizer that can step over flat buffers."""
    import bitsandbytes as bnb

    return (
        isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)
        and getattr(optimizer, "optimizer_name", "") in ELEMENTWISE
        and optimizer.args.max_unorm == 0.0  # otherwise each step is scaled by the parameter's norm
    )


def _packed(parameters: Sequence[nn.Parameter], *, small: int) -> list[list[int]]:
    """The indices of the parameters in each buffer.

    Args:
        parameters: The parameters of one group.
        small: Parameters with fewer elements have state of another type, and so their own buffers.
    """
    owners = Counter(p.untyped_storage().data_ptr() for p in parameters if not p.is_meta)
    packed: list[list[int]] = []
    open_: dict[Any, list[int]] = {}
    filled: dict[Any, int] = {}
    for index, parameter in enumerate(parameters):
        size = slot(parameter.numel())
        if not _can_move(parameter, owners):
            packed.append([index])
            continue
        key = (parameter.dtype, parameter.device, parameter.numel() < small)
        if key not in open_ or filled[key] + size > BUFFER:
            open_[key], filled[key] = [], 0
            packed.append(open_[key])
        open_[key].append(index)
        filled[key] += size
    return packed


def _can_move(parameter: nn.Parameter, owners: Counter[int]) -> bool:
    """Whether nothing else depends on the memory that `parameter` uses."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return False
    storage = parameter.untyped_storage()
    own = storage.nbytes() == parameter.nbytes
    alone = owners[storage.data_ptr()] == 1
    return own and alone and parameter.is_floating_point() and parameter.numel() <= LARGEST


def _check_sizes(segment: Segment, states: dict[int, Any]) -> None:
    for parameter, index in zip(segment.parameters, segment.indices, strict=True):
        moment = states[index].get("state1")
        if moment is not None and moment.shape != parameter.shape:
            raise ValueError(
                f"state of shape {tuple(moment.shape)} for a parameter of {tuple(parameter.shape)}"
            )
