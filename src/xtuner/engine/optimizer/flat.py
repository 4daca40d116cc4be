"""Optimizer steps over a few flat buffers instead of one launch and one wait for each parameter.

bitsandbytes' optimizers launch a kernel for each parameter and wait for it to end: 448 times a
step for LoRA in a 7B. Here parameters of up to `LARGEST` numbers become views of buffers of up to
`BUFFER` numbers, and the optimizer is given the buffers. Its arithmetic is that of the library:
each number's update depends on that number alone, so a longer tensor gives the same bits
(`flat_state` on 8-bit state).

Gradients stay with the parameters until the step, where they are copied into buffers one by one, so
no gradient takes memory longer than without. A parameter without a gradient is not stepped, as in
any optimizer: its buffer is then split, for good, into the parameters that have one and those that
have none.

torch's own optimizers step over lists of tensors in few launches and are left alone, and so is
every optimizer on a CPU, where nothing is launched and one matrix at a time stays in the caches.
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
"""Most numbers in a buffer: 64 MiB of float32, which are copied at once when gradients are
collected, and moved at once where state is paged."""

LARGEST = 2**22
"""Parameters of more numbers stay alone: a step over one takes longer than its launch."""

ELEMENTWISE = frozenset({"adam", "lion", "rmsprop", "adagrad"})
"""Update rules of bitsandbytes (`optimizer_name`) in which each number's update depends on that
number alone. LAMB and LARS scale by the norm of the parameter; AdEMAMix has a state of another
shape."""


class FlatOptimizer:
    """A bitsandbytes optimizer over flat buffers; to be used as any optimizer.

    `state_dict` and `load_state_dict` speak of the parameters as the optimizer was made with, so
    checkpoints know nothing of buffers.

    Args:
        optimizer: made for the parameters of a model, not stepped yet; see `steps_by_element`.
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
                group["params"].clear()  # or they would keep their memory until all are moved
                packed = _packed(parameters, small=self._small)
                segments = [
                    Segment.of([parameters[i] for i in places], [numbers[i] for i in places])
                    for places in packed
                ]
                self.segments.append(segments)
                group["params"].extend(segment.flat for segment in segments)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer, with buffers as parameters."""
        return self.inner.param_groups  # type: ignore[no-any-return]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients; those of zeros would be another thing for moments."""
        if not set_to_none:
            raise NotImplementedError("flat buffers forget gradients")
        self._gathered = False
        for segment in self._all():
            segment.flat.grad = None
            for parameter in segment.parameters:
                parameter.grad = None

    @torch.no_grad()
    def gather(self) -> list[Tensor]:
        """Collect the gradients in buffers; return all buffers, with or without a gradient.

        To be called when all of them are there. The parameters' gradients are views from then on.
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
        """For each parameter memory that its gradient may stay in from step to step."""
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
        """That of the optimizer over the parameters; tensors are views of those of buffers."""
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
        """Load what `state_dict` gave, of this optimizer or of one over the parameters.

        Raises:
            ValueError: it belongs to other parameters.
        """
        counts = [sum(len(s.indices) for s in segments) for segments in self.segments]
        if [len(group["params"]) for group in state["param_groups"]] != counts:
            raise ValueError("the state belongs to an optimizer of other parameters")
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
        """Take `segment` of group `index` apart between neighbours with different `marks`."""
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
        """Give buffers of small parameters the 32-bit state that each of them would have.

        bitsandbytes takes 8 bits for `min_8bit_size` numbers and more, which buffers have.
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
    """Whether `optimizer` is one of bitsandbytes whose steps may be taken over flat buffers."""
    import bitsandbytes as bnb

    return (
        isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit)
        and getattr(optimizer, "optimizer_name", "") in ELEMENTWISE
        and optimizer.args.max_unorm == 0.0  # else each step is scaled by the parameter's norm
    )


def _packed(parameters: Sequence[nn.Parameter], *, small: int) -> list[list[int]]:
    """Places of parameters that go into one buffer, for every buffer.

    Args:
        parameters: of one group.
        small: those of fewer numbers have state of another type, and so buffers of their own.
    """
    owners = Counter(p.untyped_storage().data_ptr() for p in parameters if not p.is_meta)
    packed: list[list[int]] = []
    open_: dict[Any, list[int]] = {}
    filled: dict[Any, int] = {}
    for place, parameter in enumerate(parameters):
        size = slot(parameter.numel())
        if not _can_move(parameter, owners):
            packed.append([place])
            continue
        key = (parameter.dtype, parameter.device, parameter.numel() < small)
        if key not in open_ or filled[key] + size > BUFFER:
            open_[key], filled[key] = [], 0
            packed.append(open_[key])
        open_[key].append(place)
        filled[key] += size
    return packed


def _can_move(parameter: nn.Parameter, owners: Counter[int]) -> bool:
    """Whether nothing else depends on where the numbers of `parameter` lie."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return False
    storage = parameter.untyped_storage()
    own = storage.nbytes() == parameter.numel() * parameter.element_size()
    alone = owners[storage.data_ptr()] == 1
    return own and alone and parameter.is_floating_point() and parameter.numel() <= LARGEST


def _check_sizes(segment: Segment, states: dict[int, Any]) -> None:
    for parameter, index in zip(segment.parameters, segment.indices, strict=True):
        moment = states[index].get("state1")
        if moment is not None and moment.shape != parameter.shape:
            raise ValueError(
                f"state of shape {tuple(moment.shape)} for a parameter of {tuple(parameter.shape)}"
            )
