"""What an exact resume needs besides the weights: ``training_state.pt`` in a checkpoint.

Data order and dropout are functions of (seed, step), so the step, the optimizer state, the loss
scale and the best metric so far are sufficient. The file contains the state of each parameter as on
a single process, whatever the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from xtuner.engine.optimizer.loss_scaler import LossScaler
from xtuner.engine.resume import DATA, completed, same
from xtuner.errors import CheckpointError
from xtuner.models.run_info import RunInfo

STATE_FILE = "training_state.pt"


def save_state(
    folder: Path,
    *,
    step: int,
    optimizer: Mapping[str, Any],
    identity: Mapping[str, Any],
    loss_scaler: LossScaler | None = None,
    best: Mapping[str, Any] | None = None,
) -> None:
    """Write the file.

    Args:
        step: Optimizer steps completed.
        optimizer: The optimizer's state, in the format of `torch.optim.Optimizer.state_dict`.
        identity: Plain values that the resumed run must share (see `load_state`).
        best: The state of a `BestMetric`.
    """
    state = {"step": step, "optimizer": dict(optimizer), "identity": dict(identity)}
    state["loss_scaler"] = (loss_scaler or LossScaler(enabled=False)).state_dict()
    state["best"] = dict(best or {})
    torch.save(state, folder / STATE_FILE)


def load_state(
    folder: Path,
    *,
    load_optimizer: Callable[[dict[str, Any]], None],
    identity: Mapping[str, Any],
    loss_scaler: LossScaler | None = None,
    load_best: Callable[[Mapping[str, Any]], None] = lambda state: None,
) -> tuple[int, list[str]]:
    """Restore the optimizer, the loss scale and the best metric; return the step and the
    differences from the run that wrote the checkpoint.

    Args:
        load_optimizer: Loads the state that was passed to `save_state`.
        load_best: Loads the state that was passed as `best`; empty in an older checkpoint.
        identity: That of this run.

    Raises:
        CheckpointError: The file is damaged or belongs to other trainable weights.
    """
    file = folder / STATE_FILE
    try:
        state = _read(file)
        load_optimizer(state["optimizer"])
        step, before = int(state["step"]), completed(state["identity"])
        _check_step(step, folder)
        if loss_scaler is not None:
            loss_scaler.load_state_dict(state.get("loss_scaler", {}))
        load_best(state.get("best", {}))
    except Exception as error:  # torch raises many error types for a damaged file
        raise CheckpointError(
            f"{file}: cannot be resumed from: {error}; try an earlier checkpoint"
        ) from error
    changed = [
        "the data" if key == DATA else f"{key}: {before.get(key)!r} then, {value!r} now"
        for key, value in identity.items()
        if not same(before.get(key), value, of_names=True) and (key in before or key != DATA)
    ]
    return step, changed


def _read(file: Path) -> Mapping[str, Any]:
    """The content of the file; ValueError if it is damaged."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many error types for a damaged file
        words = str(error).partition("\n")[0].partition(". ")[0]
        kind = type(error).__name__
        raise ValueError(f"it is damaged ({kind}{f': {words}' if words else ''})") from error
    parts = {"optimizer": Mapping, "step": int, "identity": Mapping}
    wrong = not isinstance(state, Mapping) or [
        name for name, kind in parts.items() if not isinstance(state.get(name), kind)
    ]
    if wrong:
        raise ValueError("it is not the training state of a run")
    return dict(state)


def _check_step(step: int, folder: Path) -> None:
    """Raise ValueError if ``run.yaml`` of the checkpoint names another step."""
    info = RunInfo.read(folder)
    if info is not None and info.step != step:
        raise ValueError(f"it is at step {step}, but run.yaml says {info.step}")
