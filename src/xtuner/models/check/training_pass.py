"""Training passes without side effects, and the model parts that they need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

NO_DROPOUT = 1e-12
"""A probability so small that ``1 - p`` rounds to 1: it uses the code path of dropout and drops
nothing."""


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers: the longest list of modules."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def decoder_of(causal: Any) -> Any:
    """The part of `causal` that returns hidden states; Llama 4's name differs from its
    `base_model_prefix`."""
    base = causal.base_model
    if base is not causal:
        return base
    inner = (m for m in causal.children() if isinstance(m, PreTrainedModel))
    return next(inner, causal)


def text_decoder(causal: Any) -> Any:
    """The text model of a vision-language model, otherwise `causal` itself."""
    inner = getattr(causal.base_model, "language_model", None)
    return inner if isinstance(inner, PreTrainedModel) else causal


def plain_attention(decoder: Any) -> str:
    """The name of transformers' own attention for `decoder`."""
    return "sdpa" if decoder._supports_sdpa else "eager"


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[bool]:
    """Make dropout drop nothing but use the same code path; yields whether there is any dropout."""
    changed: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        for name, value in list(vars(module).items()):
            named = "drop" in name or (
                name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            )
            if named and isinstance(value, float) and 0 < value < 1:
                changed.append((module, name, value))
    try:
        for module, name, _ in changed:
            setattr(module, name, NO_DROPOUT)
        yield bool(changed)
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


@contextlib.contextmanager
def traceless(model: nn.Module) -> Iterator[None]:
    """Run training passes without side effects: random state and modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            model.train()
            yield
    finally:
        for module, training in modes:
            module.training = training
