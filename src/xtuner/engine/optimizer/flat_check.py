"""Checks, on the run's device and before the first step, that optimizer steps over flat buffers
give the same bits as steps over each parameter."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.engine.optimizer.flat import FlatOptimizer, steps_by_element
from xtuner.errors import brief

SHAPES = ((200, 200), (5, 60), (401, 100), (70, 300), (7, 11), (96, 256))
"""Sizes of the test parameters: some do not fill a block, some are below the 4,096 elements from
which 8-bit optimizers use 8 bits, and the buffer is above the 100,000 from which state is paged."""


def wants_flat_steps(optimizer: Any) -> bool:
    """Whether `optimizer` needlessly launches and waits for each of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    on_gpu = any(p.device.type != "cpu" for p in parameters)
    return on_gpu and len(parameters) > 1 and steps_by_element(optimizer)


def fault_in_flat_steps(optimizer: Any) -> str:
    """Why `optimizer` cannot step over flat buffers; empty if it can. Two copies of test
    parameters, with the dtype and device of those of `optimizer`, take three steps, flat and one by
    one; in the last step one parameter has no gradient. Parameters and state must be bitwise equal.
    """
    try:
        alone, states = _after_steps(optimizer, flat=False)
        together, flat_states = _after_steps(optimizer, flat=True)
        if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
            return "its parameters differed on this device"
        return "" if _equal(states, flat_states) else "its state differed on this device"
    except Exception as error:  # the run continues without flat buffers
        return f"it failed on this device ({brief(error)})"


def _after_steps(optimizer: Any, *, flat: bool) -> tuple[list[nn.Parameter], Any]:
    """Parameters and state after three steps."""
    like = optimizer.param_groups[0]["params"][0]
    accepted = inspect.signature(type(optimizer)).parameters
    options = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    parameters = [nn.Parameter(_numbers(i, shape, like)) for i, shape in enumerate(SHAPES)]
    twin = type(optimizer)(parameters, **{**options, "lr": 0.01, "weight_decay": 0.1})
    stepped = FlatOptimizer(twin) if flat else twin
    for step in range(3):
        for i, parameter in enumerate(parameters):
            missing = step == 2 and i == 2
            shift = len(SHAPES) * (step + 1) + i
            parameter.grad = None if missing else _numbers(shift, parameter.shape, like)
        stepped.step()
        stepped.zero_grad(set_to_none=True)
    return parameters, stepped.state_dict()["state"]


def _numbers(shift: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Numbers between -1 and 1 that differ for each `shift`; they use no random state."""
    count = torch.Size(shape).numel()
    numbers = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + shift)
    return numbers.view(*shape).to(like.device, like.dtype)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return same and torch.equal(a.to(b.device), b)
    return bool(a == b)
