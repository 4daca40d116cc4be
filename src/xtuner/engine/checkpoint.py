"""Checkpoints that are there whole or not at all, and what an exact resume needs.

    work_dir/iter_N/      weights in Hugging Face format, tokenizer, run.yaml: usable at once
             training_state.pt   step, optimizer and loss scale: only for resuming
    work_dir/last_checkpoint     the name of the newest

Everything is written into a hidden folder, flushed to the disk and renamed; the oldest checkpoint
is deleted only after the new one stands. A process killed at any moment leaves whole checkpoints
and at most one hidden folder, which the next save removes. Data order and dropout are functions of
(seed, step), so step and optimizer state are all that a resume needs beside the weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.optimizer.optim import load_optimizer
from xtuner.engine.resume import DATA, completed
from xtuner.errors import CheckpointError, LaunchError
from xtuner.models.save import flush, flush_tree

STATE_FILE = "training_state.pt"
LAST_FILE = "last_checkpoint"
_NAME = re.compile(r"iter_(\d+)$")


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one work dir.

    Attributes:
        work_dir: where the ``iter_N`` folders are.
        limit: how many are kept; -1 keeps all.
    """

    work_dir: Path
    limit: int = -1

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest step first."""
        found = (p for p in self.work_dir.glob("iter_*") if _NAME.fullmatch(p.name) and p.is_dir())
        return sorted(found, key=step_of)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write checkpoint ``iter_<step>`` through `write`, which fills an empty folder.

        Raises:
            LaunchError: the disk is full, or memory is; earlier checkpoints are untouched.
        """
        target = self.work_dir / f"iter_{step}"
        self.tidy()
        draft = self.work_dir / f".iter_{step}.writing"
        draft.mkdir(parents=True)
        try:
            write(draft)
            flush_tree(draft)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            # torch reports a full disk as RuntimeError, safetensors as an error of its own
            if not isinstance(error, OSError | RuntimeError | SafetensorError | MemoryError):
                raise
            if is_out_of_memory(error):
                raise LaunchError(
                    f"cannot write checkpoint {target}: there is not enough memory for it. Earlier "
                    "checkpoints are untouched; end other programs or lower the settings that take "
                    "memory (`xtuner train --dry-run` names them), and go on with --resume."
                ) from error
            free = shutil.disk_usage(self.work_dir).free / 2**20
            raise LaunchError(
                f"cannot write checkpoint {target}: {error} ({free:,.0f} MiB free). "
                "Earlier checkpoints are untouched; make room and go on with --resume."
            ) from error
        if target.exists():  # the same step again: set the old one aside until the new one stands
            aside = self.work_dir / f".iter_{step}.old"
            os.rename(target, aside)
            os.rename(draft, target)
            shutil.rmtree(aside)
        else:
            os.rename(draft, target)
        self._point_at(target)
        flush(self.work_dir)
        self._prune(keep=target)
        return target

    def tidy(self) -> None:
        """Remove what a killed save or deletion left behind."""
        for leftover in self.work_dir.glob(".iter_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _point_at(self, target: Path) -> None:
        draft = self.work_dir / f".{LAST_FILE}.writing"
        draft.write_text(target.name + "\n", encoding="utf-8")
        flush(draft)
        os.replace(draft, self.work_dir / LAST_FILE)

    def _prune(self, keep: Path) -> None:
        if self.limit < 0:
            return
        old = [p for p in self.all() if p != keep]
        for path in old[: max(0, len(old) + 1 - self.limit)]:
            _remove(path)

    def clear(self) -> None:
        """Delete all checkpoints."""
        (self.work_dir / LAST_FILE).unlink(missing_ok=True)
        for path in self.all():
            _remove(path)

    def find(self, which: str | None = None) -> Path:
        """The checkpoint named `which` ('iter_N', a path, or None for the newest).

        Raises:
            CheckpointError: there is none, or it cannot be resumed from.
        """
        there = self.all()
        if which is None:
            if not there:
                raise CheckpointError(
                    f"{self.work_dir}: holds no checkpoint to resume from; start without --resume"
                )
            pointer = self.work_dir / LAST_FILE
            newest = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
            return next((path for path in there if path.name == newest), there[-1])
        name = Path(which).name.removesuffix(".pth")
        path = Path(which) if Path(which).is_dir() else self.work_dir / name
        if not (path / STATE_FILE).is_file():
            names = ", ".join(p.name for p in there) or "none"
            raise CheckpointError(
                f"cannot resume from {path}: it lacks {STATE_FILE}. In {self.work_dir}: {names}"
            )
        return path


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, hidden first: a kill in between leaves no half one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step of ``iter_N``."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def save_state(
    folder: Path,
    *,
    step: int,
    optimizer: Any,
    identity: Mapping[str, Any],
    loss_scaler: LossScaler | None = None,
) -> None:
    """Write what resuming needs beside the weights.

    Args:
        folder: the checkpoint.
        step: optimizer steps done.
        optimizer: its state is kept.
        identity: plain values that the resumed run must share (see `load_state`).
        loss_scaler: its state is kept.
    """
    state = {"step": step, "optimizer": optimizer.state_dict(), "identity": dict(identity)}
    if loss_scaler is not None:
        state["loss_scaler"] = loss_scaler.state_dict()
    torch.save(state, folder / STATE_FILE)


def load_state(
    folder: Path,
    *,
    optimizer: Any,
    identity: Mapping[str, Any],
    loss_scaler: LossScaler | None = None,
) -> tuple[int, list[str]]:
    """Restore the optimizer and the loss scale; return the step and what differs from the run that
    wrote the checkpoint.

    Raises:
        CheckpointError: the file is damaged or belongs to other trainable weights.
    """
    file = folder / STATE_FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        load_optimizer(optimizer, state["optimizer"])
        step, before = int(state["step"]), completed(state["identity"])
        if loss_scaler is not None:
            loss_scaler.load_state_dict(state.get("loss_scaler", {}))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise CheckpointError(
            f"{file}: cannot be resumed from: {error}; try an earlier checkpoint"
        ) from error
    changed = [
        "the data" if key == DATA else f"{key}: {before.get(key)!r} then, {value!r} now"
        for key, value in identity.items()
        if before.get(key) != value and (key in before or key != DATA)
    ]
    return step, changed
