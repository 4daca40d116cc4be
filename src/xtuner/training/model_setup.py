"""Makes the model of a run and hands it to the strategy."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from xtuner.config.schema import Settings
from xtuner.engine.optimizer import optim
from xtuner.engine.strategies.base import BaseStrategy
from xtuner.memory.plan import MemoryPlan
from xtuner.models import vocabulary
from xtuner.models.adapters import notes_on_adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.facts import facts_of
from xtuner.models.neftune import EmbeddingNoise
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.models.text_path import note_on_frozen
from xtuner.parallel.processes import Processes
from xtuner.training.holdings import holdings
from xtuner.training.vision import RunVision


def make_model(
    s: Settings,
    plan: MemoryPlan,
    processes: Processes,
    *,
    dtype: torch.dtype,
    vision: RunVision | None,
    weights: Path | None,
    packing_asked: bool,
    console: Console,
) -> PackedCausalLM:
    """Load and prepare the model, and verify that packed samples stay apart.

    Args:
        dtype: The dtype of the computation.
        vision: The parts of an image model; None for text.
        weights: A folder whose weights replace those of the base model.
        packing_asked: The user set `pack_to_max_length = True`.

    Raises:
        ModelError: The model cannot be loaded or trained.
    """
    device, recompute = str(processes.device), plan.forecast.recompute
    llm = make_trainable(
        s,
        dtype=dtype,
        device=device,
        recompute=recompute,
        embedding_on_cpu=plan.embedding_on_cpu,
        source=weights,
    )
    if vision:
        model: PackedCausalLM = vision.join(llm, dtype=dtype, device=device, source=weights)
        if recompute and s.visual_encoder_training != "frozen":
            vision.recompute()
    else:
        model = PackedCausalLM(llm, autocast=llm_autocast(s, dtype))
    if note := model.verify(packed=packing_asked):
        console.print(f"Note: {note}.")
    if processes.sequence is not None:
        model.split_rows(processes.sequence)
    if s.resize_embeddings:
        console.print(f"Note: {vocabulary.growth(model.causal, facts_of(s).vocab_size)}.")
    for note in notes_on_adapters(llm) if s.uses_adapter else ():
        console.print(f"Note: {note}.", markup=False)
    if s.llm_training == "full" and (frozen := note_on_frozen(llm)):
        console.print(f"Note: {frozen}.", markup=False)
    for line in vision.trained() if vision else ():
        console.print(line, markup=False)
    if s.neftune_noise_alpha is not None:
        embedding = model.causal.get_input_embeddings()
        model.noise = EmbeddingNoise(embedding, s.neftune_noise_alpha)
    return model


def hand_over(
    model: PackedCausalLM,
    strategy: BaseStrategy,
    s: Settings,
    plan: MemoryPlan,
    *,
    console: Console,
) -> None:
    """Hand the model to the strategy, which makes the optimizer; print what each process holds.

    Args:
        model: The model on the device of this process.
        strategy: A new strategy.
    """

    def make_optimizer(prepared: nn.Module) -> torch.optim.Optimizer:
        return optim.make_optimizer(
            strategy.optimizer_for(s.optim_type),
            prepared,
            lr=s.lr,
            betas=s.betas,
            weight_decay=s.weight_decay,
            loraplus_lr_ratio=s.loraplus_lr_ratio,
            paged=plan.paged,
        )

    together = strategy.lockstep and strategy.processes.world_size > 1
    model.always_embeds = model.embedder is not None and together
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in optim.trainable(model))
    strategy.prepare(model, make_optimizer)
    held = holdings(strategy, weights=weights, gradients=trained, optimizer=plan.forecast.optimizer)
    for line in held:
        console.print(line, markup=False)
    for note in strategy.notes:
        console.print(f"Note: {note}", markup=False)
