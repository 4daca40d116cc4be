"""Optimizers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from xtuner.engine.optimizer.muon import MuonWithAdamW
from xtuner.errors import ConfigError, did_you_mean


def make_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    paged: bool = True,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """Create optimizer `name` for the trainable parameters of `model`. Biases and norms
    (one-dimensional parameters) get no weight decay.

    Args:
        name: Name of a class in torch.optim or bitsandbytes.optim.
        betas: Passed if the class accepts them.
        loraplus_lr_ratio: Learning-rate factor of the adapters' B matrices (LoRA+,
            arXiv:2402.12354).
        paged: False replaces a paged optimizer by its unpaged version, which has the same
            arithmetic.

    Raises:
        ConfigError: Neither torch.optim nor bitsandbytes has it, or it cannot be used here.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == "Muon":
        if loraplus_lr_ratio:
            raise ConfigError("loraplus_lr_ratio: Muon scales its own updates; set it to None")
        return MuonWithAdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
    kind = _optimizer_class(name, paged=paged)
    faster = [p for n, p in trained if loraplus_lr_ratio and ".lora_B." in n]
    others = [p for n, p in trained if not (loraplus_lr_ratio and ".lora_B." in n)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        {"params": faster, "weight_decay": weight_decay, "lr_scale": loraplus_lr_ratio},
    ]
    accepted = inspect.signature(kind).parameters
    options = {"lr": lr, "betas": betas, "fused": True}
    options = {option: value for option, value in options.items() if option in accepted}
    try:
        optimizer: torch.optim.Optimizer = kind([g for g in groups if g["params"]], **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"optim_type = {name!r}: cannot be used here: {error}") from error
    return optimizer


def check_name(name: str) -> None:
    """Raise ConfigError if neither torch.optim nor bitsandbytes has optimizer `name`."""
    _optimizer_class(name, paged=True)


def _optimizer_class(name: str, *, paged: bool) -> Any:
    unsupported = ("Optimizer", "LBFGS", "SparseAdam")
    known = {n: c for n, c in _classes(torch.optim).items() if n not in unsupported}
    if name in known:
        return known[name]
    import bitsandbytes.optim

    quantised = _classes(bitsandbytes.optim)
    if name not in quantised:
        allowed = sorted({*known, *quantised})
        raise ConfigError(
            f"optim_type = {name!r}: unknown optimizer{did_you_mean(name, allowed)}; "
            f"allowed: {', '.join(allowed)}"
        )
    return quantised[name if paged else unpaged(name)]


def _classes(module: Any) -> dict[str, Any]:
    """The optimizers of `module`, by name."""
    base = torch.optim.Optimizer
    return {n: c for n, c in vars(module).items() if isinstance(c, type) and issubclass(c, base)}


def unpaged(name: str) -> str:
    """The unpaged version of a paged optimizer, used on a CPU, which cannot page, and if the state
    fits on the GPU. A paged optimizer keeps its state in memory that moves between GPU and CPU; its
    arithmetic is the same.
    """
    return name.removeprefix("Paged")


def is_paged(name: str) -> bool:
    """Whether the optimizer is a paged one."""
    return unpaged(name) != name


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a `state_dict`; paged state is loaded into pageable memory. bitsandbytes would move it
    to the GPU for good (0.50 creates paged memory only for new state).
    """
    if not getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict(state)
        return
    # The first step moves state that is not paged.
    optimizer.load_state_dict(state, move_to_device=False)
    buffers = []
    for parameter, values in optimizer.state.items():
        for name in ("state1", "state2"):
            value = values.get(name)
            if isinstance(value, torch.Tensor) and parameter.device.type != "cpu":
                buffer = optimizer.get_state_buffer(parameter, dtype=value.dtype)
                if getattr(buffer, "is_paged", False) and buffer.shape == value.shape:
                    buffers.append((buffer, value))
                    values[name] = buffer
    if buffers:
        torch.cuda.synchronize()  # the GPU is still zeroing the new memory
    for buffer, value in buffers:
        buffer.copy_(value)


def learning_rate(
    step: int,
    *,
    total_steps: int,
    peak: float,
    warmup_ratio: float,
    schedule: Literal["cosine", "linear", "constant"],
    end_ratio: float = 0.0,
    warmup_steps: int | None = None,
) -> float:
    """Learning rate of optimizer step `step` (from 0).

    Rises linearly over the first ``warmup_ratio * total_steps`` steps, reaches `peak`, and then
    falls along ``(1 + cos(pi t)) / 2`` or ``1 - t`` from `peak` to ``end_ratio * peak``, or stays
    constant, where t is the completed fraction of the remaining steps. `warmup_steps` overrides the
    ratio.
    """
    warmup = math.ceil(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    t = (step - warmup) / max(1, total_steps - warmup)
    left = (1 + math.cos(math.pi * t)) / 2 if schedule == "cosine" else 1 - t
    return peak * (end_ratio + (1 - end_ratio) * left)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Set the learning rate of every parameter group, times its own `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters, in a fixed order."""
    return [p for p in model.parameters() if p.requires_grad]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> float:
    """Clip gradients to `max_norm` (None: do not clip) and return their norm before clipping."""
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    value = float(norm)  # the only synchronization with the GPU
    if max_norm is not None and value > max_norm:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value
