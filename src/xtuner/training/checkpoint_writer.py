"""Writes the checkpoints of a run, on all of its processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.device.select import name_of
from xtuner.engine.best import BestMetric
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.engine.hooks.base import Run
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.spill import Spill, as_it_is
from xtuner.engine.strategies.base import BaseStrategy, Keep
from xtuner.engine.training_state import load_state, save_state
from xtuner.models import original
from xtuner.models.load import lasting_name
from xtuner.models.run_info import RunInfo, installed_versions
from xtuner.models.save import save_model
from xtuner.templates.base import Template
from xtuner.training.vision import RunVision

_WRAPPED = "model."
"""Prefix of the language model's parameter names in `PackedCausalLM`."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Saves the checkpoints of a run, and restores them for a resume.

    Attributes:
        settings: The run's settings.
        store: The checkpoint store.
        strategy: Holds weights and optimizer state.
        model: The language model, in a PEFT wrapper if it has adapters.
        tokenizer, template: The run's tokenizer and template.
        identity: Plain values that a resumed run should share.
        dtype: The dtype of the computation.
        loss_scaler: The loss scaler of a float16 run.
        best: The best metric so far.
        vision: Holds the trained parts of an image model; None without image input.
        console: The console for messages.
    """

    settings: Settings
    store: CheckpointStore
    strategy: BaseStrategy
    model: Any
    tokenizer: Any
    template: Template
    identity: Mapping[str, Any]
    dtype: torch.dtype
    loss_scaler: LossScaler
    best: BestMetric
    vision: RunVision | None
    console: Console

    def save(self, run: Run) -> None:
        """Save the current step of `run`; a collective call.

        Raises:
            LaunchError: The disk or memory is full.
        """
        if not self.console.is_terminal:  # where a bar is drawn
            self.console.print(f"Saving iter_{run.count}...", markup=False)
        path = self.store.save(
            run.count,
            lambda folder: self._write(folder, run),
            processes=self.strategy.processes,
        )
        self.console.print(f"Saved {path}", markup=False)

    def restore(self, source: Path, run: Run) -> None:
        """Restore optimizer, step and best metric from checkpoint `source`.

        Raises:
            CheckpointError: It is damaged or belongs to other trainable weights.
        """
        run.step, changed = load_state(
            source,
            load_optimizer=self.strategy.load_optimizer_state,
            identity=self.identity,
            loss_scaler=self.loss_scaler,
            load_best=lambda state: self.best.load_state_dict(state, source=source),
        )
        run.start_step = run.step
        self.console.print(f"Resuming from {source} at step {run.step}.", markup=False)
        if changed:
            self.console.print(
                "Note: these changes make this run differ from an uninterrupted one: "
                + "; ".join(changed),
                markup=False,
            )

    def _write(self, folder: Path, run: Run) -> None:
        """Gather on all processes, and write on the main process."""
        spill = Spill(folder)
        keep = spill.keep if self.strategy.gathers else as_it_is
        weights = self._trained_weights(keep)
        optimizer = self.strategy.optimizer_state(keep)
        spill.check()
        if optimizer is None or not self.strategy.processes.is_main:
            return
        if self.vision:
            self.vision.save(folder, weights)
        else:
            save_model(self.model, folder, trained=weights)
        complete = not self.vision and not self.settings.uses_adapter
        base = original.folder_of(self.settings.pretrained_model_name_or_path) if complete else None
        if base is not None:
            original.keep_config(base, folder)
        original.keep_tokenizer(self.tokenizer, base, folder)
        self._info(run).write(folder)
        save_state(
            folder,
            step=run.step,
            optimizer=optimizer,
            identity=self.identity,
            loss_scaler=self.loss_scaler,
            best=self.best.state_dict(),
        )

    def _trained_weights(self, keep: Keep) -> dict[str, Tensor]:
        """The trained weights by their names in `model`, on the main process. They are not copies
        if every process holds all weights; gathered weights are kept on disk.
        """
        first = {id(p): name for name, p in self.model.named_parameters()}
        names = {
            name: first[id(p)] for name, p in self.model.named_parameters(remove_duplicate=False)
        }
        found = {
            name.removeprefix(_WRAPPED): keep(tensor) if self.strategy.sharded else tensor
            for name, tensor in self._weights()
            if tensor is not None
        }
        return {name: found[own] for name, own in names.items() if own in found}

    def _weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """The trained weights; if weights are sharded, also frozen ones that are written."""
        if not self.strategy.sharded:
            return self.strategy.trained_weights()
        adapted = self.settings.uses_adapter
        models = (
            self.vision.parts.saved_in_full() if self.vision else [] if adapted else [self.model]
        )
        full = {id(p) for model in models for p in model.parameters() if not p.requires_grad}
        also = {_WRAPPED + n for n, p in self.model.named_parameters() if id(p) in full}
        return self.strategy.trained_weights(also) if also else self.strategy.trained_weights()

    def _info(self, run: Run) -> RunInfo:
        return RunInfo(
            kind="llava" if self.vision else "adapter" if self.settings.uses_adapter else "model",
            base_model=lasting_name(self.settings.pretrained_model_name_or_path),
            prompt_template=self.template.name,
            template=self.template.as_fields(),
            system=self.settings.SYSTEM,
            step=run.step,
            epoch=round(run.epoch, 6),
            settings=self.settings.model_dump(mode="json"),
            versions=installed_versions(),
            visual_encoder=self.vision.encoder if self.vision else "",
            dtype=name_of(self.dtype),
        )
