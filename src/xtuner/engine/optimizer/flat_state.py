"""Converts the bitsandbytes state of a flat buffer to the state of its parameters, and back.

Every parameter starts at a multiple of `BLOCK` elements. 8-bit state has one scale per `BLOCK`
elements, so no scale belongs to two parameters, and a parameter's state has the same bits in a
buffer and on its own. A checkpoint contains the state of each parameter, never of a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Elements that share a scale in bitsandbytes' 8-bit optimizers."""

VALUES = ("state1", "state2")
"""Entries with one value per element of the parameter."""

SCALES = ("absmax1", "absmax2")
"""Entries with one value per `BLOCK` elements of the parameter."""

State = dict[str, Any]


def slot(numel: int) -> int:
    """Elements that a parameter of `numel` elements takes in a buffer."""
    return -(-numel // BLOCK) * BLOCK


def part_of(state: State, *, start: int, shape: Sequence[int]) -> State:
    """The state of a parameter of `shape` that starts at element `start` of the buffer. Its tensors
    are views of those in `state`, and paged if those are. Entries that all parameters share (the
    step, the quantization map) are used unchanged.
    """
    count = torch.Size(shape).numel()
    part: State = {}
    for name, value in state.items():
        if isinstance(value, dict):  # bitsandbytes nests what FSDP should not gather
            part[name] = part_of(value, start=start, shape=shape)
        elif name in VALUES:
            part[name] = _paged_as(value, value[start : start + count].view(*shape))
        elif name in SCALES:
            part[name] = value[start // BLOCK : (start + slot(count)) // BLOCK]
        else:
            part[name] = value
    return part


def joined(states: Sequence[State]) -> State:
    """The state of a buffer of parameters with `states`, which share step and dtype.

    Args:
        states: The results of `plain`, in the order of the buffer.
    """
    flat_state = dict(states[0])
    for name in states[0]:
        parts = [state[name] for state in states]
        if name in VALUES:
            empty = _code_of_zero(states[0], name)
            flat_state[name] = torch.cat([_padded(part.reshape(-1), empty) for part in parts])
        elif name in SCALES:
            flat_state[name] = torch.cat(parts)
    return flat_state


def plain(state: State) -> State:
    """`state` without the nesting that bitsandbytes' `state_dict` adds."""
    flat: State = {}
    for name, value in state.items():
        flat.update(plain(value) if isinstance(value, dict) else {name: value})
    return flat


def kind(state: State | None) -> tuple[Any, ...]:
    """What the parameters of one buffer share: the step and the dtypes of their state."""
    if not state:
        return ()
    types = ((n, v.dtype) for n, v in state.items() if isinstance(v, Tensor))
    return (state.get("step"), *sorted(types, key=lambda item: item[0]))


def _padded(values: Tensor, empty: int) -> Tensor:
    missing = slot(values.numel()) - values.numel()
    return torch.cat([values, values.new_full((missing,), empty)]) if missing else values


def _code_of_zero(state: State, name: str) -> int:
    """The value that represents 0 in `state[name]`; anything else in the padding would change a
    scale."""
    if state[name].dtype != torch.uint8:
        return 0
    return int(state[name.replace("state", "qmap")].abs().argmin())


def _paged_as(flat_state: Tensor, part: Tensor) -> Tensor:
    """`part`, a view of `flat_state`, with the attributes by which bitsandbytes recognizes paged
    memory."""
    if getattr(flat_state, "is_paged", False):
        part.is_paged = True  # type: ignore[attr-defined]
        part.page_deviceid = flat_state.page_deviceid  # type: ignore[attr-defined]
    return part
