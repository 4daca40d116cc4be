"""Checks an optimizer's saved state before it is loaded. torch accepts state of any shape; its
fused kernels would then read and write out of bounds. Non-finite moments make every later weight
NaN.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from xtuner.engine.optimizer.flat_state import SCALES, VALUES

_MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg",
    "grad_avg", "acc_delta", "sum", "prev", "step_size", "ax", *VALUES,
}  # fmt: skip
"""Entries of torch's and bitsandbytes' optimizers with one value per element of the parameter."""
_NOT_NEGATIVE = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "sum"}
_BLOCKS = (64, 128, 256, 2048)
_TABLES = re.compile(r"qmap\d|gnorm_vec|unorm_vec")


def check_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Raise ValueError if `state`, a `state_dict`, does not fit `optimizer`. Every entry must match
    its parameter's shape, and moments and scales must be finite.
    """
    groups, saved = _parameters(optimizer), state["param_groups"]
    counts = [len(group) for group in groups]
    theirs = [len(group["params"]) for group in saved]
    if counts != theirs:
        raise ValueError(
            f"its optimizer has groups of {theirs} parameters, and this run's of {counts}"
        )
    parameters = itertools.chain.from_iterable(groups)
    numbers = itertools.chain.from_iterable(group["params"] for group in saved)
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in _entries(state["state"].get(number, {})):
            if problem := _problem(name, value, parameter):
                raise ValueError(f"{name!r} of parameter {number} in the optimizer: {problem}")


def _parameters(optimizer: Any) -> list[list[Tensor]]:
    """The parameters of each group; for a `FlatOptimizer`, those in its buffers."""
    if not hasattr(optimizer, "segments"):
        return [list(group["params"]) for group in optimizer.param_groups]
    groups = []
    for segments in optimizer.segments:
        pairs = [
            pair for each in segments for pair in zip(each.indices, each.parameters, strict=False)
        ]
        groups.append([parameter for _, parameter in sorted(pairs, key=lambda pair: pair[0])])
    return groups


def _entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping):  # bitsandbytes nests what FSDP should not gather
            yield from _entries(value)
        else:
            yield str(name), value


def _problem(name: str, value: Any, parameter: Tensor) -> str:
    """What is wrong with entry `name` of `parameter`; empty if it is valid."""
    shape = parameter.shape
    if name == "step" and not _is_step(value):
        return f"is {value!r:.60}, but must be a number of steps"
    if not isinstance(value, Tensor):
        return ""
    if not _fits(name, value, shape):
        return f"has the shape {list(value.shape)}, and the parameter {list(shape)}"
    dense = value.layout == torch.strided
    if not dense or not (value.is_contiguous() or value.stride() == parameter.stride()):
        return "is not contiguous in memory, as fused kernels require"
    if name in _MOMENTS - set(VALUES) and not value.is_floating_point():
        return f"is of type {value.dtype}, but must hold floating-point numbers"
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        return "is not finite; the run diverged before it was saved, or the file is damaged"
    if name in _NOT_NEGATIVE and bool((value < 0).any()):
        return "is negative, but must be a sum of squares"
    return ""


def _is_step(value: Any) -> bool:
    """Whether `value` is a count of steps."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.layout != torch.strided or value.is_complex():
            return False
        value = value.item()
    return isinstance(value, int | float) and 0 <= value < 2**53


def _fits(name: str, value: Tensor, shape: torch.Size) -> bool:
    if name in SCALES:
        return value.numel() in {-(-shape.numel() // block) for block in _BLOCKS}
    if name in _MOMENTS:
        # bitsandbytes' AdEMAMix keeps two moments in state1
        return value.shape == shape or (name in VALUES and value.shape == (2, *shape))
    if value.numel() == 1 or value.shape == shape or _TABLES.fullmatch(name):
        return True
    # Adafactor keeps sums over rows and columns
    sides = zip(value.shape, shape, strict=False)
    return value.ndim == len(shape) and all(a in (1, b) for a, b in sides)
