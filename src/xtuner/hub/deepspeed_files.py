"""Read the folders that DeepSpeed's `save_checkpoint` writes: ``iter_N.pth/``, ``global_step_N/``.

    mp_rank_00_model_states.pt                   stages 1 and 2: the model as it computes
    zero_pp_rank_R_mp_rank_00_model_states.pt    stage 3: names, shapes, parts of frozen weights
    *zero_pp_rank_R_mp_rank_00_optim_states.pt   float32 weights that are trained, in parts

Trained weights are taken in float32 from the parts of all processes, all others from the model
files. DeepSpeed's own `zero_to_fp32.py` executes the pickles, and loses frozen weights of stage 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.errors import CheckpointError, count

Load = Callable[[Path], dict[str, Any]]
"""Reads a torch file without executing it."""

_MODEL = "*mp_rank_*_model_states.pt"
_OPTIMIZER = "*zero_pp_rank_*_mp_rank_*_optim_states.pt"
_RANK = re.compile(r"zero_pp_rank_(\d+)_")


def folder_of(path: Path) -> Path | None:
    """The folder with DeepSpeed's files: `path`, or the newest one that `path` refers to; None if
    there is none."""
    if not path.is_dir():
        return None
    if any(path.glob(_MODEL)):
        return path
    latest = path / "latest"
    if latest.is_file():
        inner = path / Path(latest.read_text(encoding="utf-8").strip()).name
        return inner if inner.is_dir() and any(inner.glob(_MODEL)) else None
    return None


def read(folder: Path, load: Load) -> dict[str, Tensor]:
    """The weights in `folder` by name.

    Raises:
        CheckpointError: A file is missing or damaged, or the model was split by layers as well.
    """
    models = sorted(folder.glob(_MODEL), key=_rank)
    split = {name[1] for p in models if (name := re.search(r"mp_rank_(\d+)_", p.name))}
    if len(split) > 1:
        raise CheckpointError(
            f"{folder}: the model was split over {len(split)} GPUs (tensor parallel), which is not "
            "supported; convert it with the tool that wrote it"
        )
    parts = [load(file) for file in sorted(folder.glob(_OPTIMIZER), key=_rank)]
    states = [_optimizer_of(part, folder) for part in parts]
    first = load(models[0])
    if not states:
        return tensors_in(first.get("module", first))
    _check_ranks(folder, states)
    if "fp32_flat_groups" in states[0]:
        return _stage_3(folder, [first, *map(load, models[1:])], states)
    return _stage_1_and_2(first, states)


def _rank(path: Path) -> int:
    found = _RANK.search(path.name)
    return int(found[1]) if found else 0


def _optimizer_of(content: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    state = content.get("optimizer_state_dict")
    if not isinstance(state, Mapping) or "zero_stage" not in state:
        raise CheckpointError(f"{folder}: its optimizer files are not those of DeepSpeed's ZeRO")
    return state


def _check_ranks(folder: Path, states: Sequence[Mapping[str, Any]]) -> None:
    ranks = states[0].get("partition_count", len(states))
    ranks = int(max(ranks) if isinstance(ranks, list | tuple) else ranks)
    if ranks != len(states):
        raise CheckpointError(
            f"{folder}: {count(ranks, 'process', 'processes')} wrote it, and it has the optimizer "
            f"files of {len(states)}; copy the others next to them"
        )


def tensors_in(state: Any) -> dict[str, Tensor]:
    """The tensors of a state dict by name, without empty ones, which stand for sharded weights."""
    items = dict(state).items()
    return {str(n): t.detach() for n, t in items if isinstance(t, Tensor) and t.numel()}


def _groups(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Names and shapes of trained weights, one mapping per group of the optimizer."""
    shapes = content.get("param_shapes") or []
    return [shapes] if isinstance(shapes, Mapping) else list(shapes)


def _shared(content: Mapping[str, Any], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found`, and the names that share a weight with another, such as tied embeddings."""
    pairs = content.get("shared_params") or {}
    pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
    return found | {str(name): found[own] for name, own in pairs if own in found}


def _stage_1_and_2(
    content: Mapping[str, Any], states: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Groups are cut into equal parts: their sum is the group, with padding at its end."""
    found = tensors_in(content.get("module", content))
    for number, shapes in enumerate(_groups(content)):
        pieces = [state["single_partition_of_fp32_groups"][number] for state in states]
        flat, start = torch.cat([piece.reshape(-1) for piece in pieces]), 0
        for name, shape in shapes.items():
            size = torch.Size(shape).numel()
            found[str(name)] = flat[start : start + size].view(torch.Size(shape)).detach().clone()
            start += size
    return _shared(content, found)


def _stage_3(
    folder: Path, contents: Sequence[Mapping[str, Any]], states: Sequence[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Each weight is cut into as many parts as there are processes, the last one padded."""
    if len(contents) != len(states):
        raise CheckpointError(
            f"{folder}: has {count(len(states), 'optimizer file')} and "
            f"{count(len(contents), 'model file')}; copy the others next to them"
        )
    found = tensors_in(contents[0].get("module", {}))
    for name, shape in (contents[0].get("frozen_param_shapes") or {}).items():
        pieces = [content["frozen_param_fragments"][name] for content in contents]
        found[str(name)] = _joined(pieces, shape)
    flats = [torch.cat([f.reshape(-1) for f in state["fp32_flat_groups"]]) for state in states]
    start = 0
    for shapes in _groups(contents[0]):
        for name, shape in shapes.items():
            size = math.ceil(torch.Size(shape).numel() / len(states))
            found[str(name)] = _joined([flat[start : start + size] for flat in flats], shape)
            start += size
    return _shared(contents[0], found)


def _joined(pieces: Sequence[Tensor], shape: Any) -> Tensor:
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    shape = torch.Size(shape)
    return flat[: shape.numel()].view(shape).detach().clone()
