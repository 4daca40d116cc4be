"""Decides whether a run records its decoder as CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich.console import Console

from xtuner.config.schema import Settings
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.errors import TrainingError
from xtuner.kernels.attention import packed
from xtuner.kernels.cuda_graphs import CudaRecorder
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.graphs.decoder import GraphedDecoder


def use(
    model: PackedCausalLM,
    settings: Settings,
    strategy: BaseStrategy,
    *,
    fits: bool,
    console: Console,
) -> None:
    """Let `model` replay its decoder, according to `cuda_graphs` and if it is possible.

    Args:
        model: The model whose decoder is recorded.
        strategy: A prepared strategy.
        fits: Whether the forecast leaves memory for gradients during a forward pass.
        console: For a note on why graphs are not used.

    Raises:
        TrainingError: `cuda_graphs` is True and graphs cannot be used; the model may also raise it
            later.
    """

    def report(why: str) -> None:
        if settings.cuda_graphs is True:
            raise TrainingError(f"{why}. Set cuda_graphs = 'auto' to train without them")
        console.print(f"Note: {why}.", markup=False)

    if settings.cuda_graphs is False or not fits or model.device.type != "cuda":
        return
    if reason := next(_obstacles(model, settings, strategy), None):
        if settings.cuda_graphs is True:
            report(f"CUDA graphs are not used: {reason}")
        return
    model.graphs = GraphedDecoder(
        model.decoder,
        module=model.causal,
        parameters=model.decoder_parameters,
        gradients=strategy.gradient_memory,
        recorder=CudaRecorder,
        autocast=lambda: torch.autocast(
            "cuda", dtype=model.autocast, enabled=model.autocast is not None, cache_enabled=False
        ),
        report=report,
    )


def _obstacles(model: PackedCausalLM, settings: Settings, strategy: BaseStrategy) -> Iterator[str]:
    """Why the decoder cannot be recorded, if that is known in advance."""
    if not (torch.version.cuda or torch.version.hip):
        yield "this build of torch has none"
    if strategy.sharded or strategy.gathers:
        yield "weights or gradients are sharded across processes"
    if model.sequence is not None:
        yield "processes share the tokens of a row"
    if model.apart:
        yield "the model takes one sample at a time"
    if model.causal.config.get_text_config()._attn_implementation != packed.NAME:
        yield f"attn_implementation = {settings.attn_implementation!r}"
    if settings.effective_quantization == "int8":
        yield "8-bit weights search for outliers on the CPU"
    if not settings.packs:
        yield "rows have different lengths (pack_to_max_length = False)"
    if not model.reads_embeddings_alone():
        yield "the model reads token ids in its layers"
