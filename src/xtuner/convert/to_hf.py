"""Turn a checkpoint of a run into a folder to keep: a PEFT adapter, or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.convert.output import copy_others, new_folder
from xtuner.convert.weights import (
    Planned,
    Weights,
    cast_plan,
    parse_size,
    total_bytes,
    write_config,
    write_shards,
)
from xtuner.device.select import DTYPES
from xtuner.errors import CheckpointError
from xtuner.hub import fetch
from xtuner.models.run_info import RunInfo
from xtuner.models.vision.folder import LLM, LLM_ADAPTER, PROJECTOR, run_of

_MARKS = ("adapter_config.json", "config.json")
LEFT_OUT = (
    "training_state.pt", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"
)  # fmt: skip
"""What only resuming needs, and what is written anew."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` means.

    Args:
        path: an ``iter_N``, an ``iter_N.pth`` as in scripts of earlier versions, or a work dir,
            whose newest checkpoint is taken.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    path = path.expanduser()
    folder = path.with_suffix("") if path.suffix == ".pth" else path
    pointer = folder / "last_checkpoint"
    if pointer.is_file():
        folder = folder / Path(pointer.read_text(encoding="utf-8").strip()).name
    if any((folder / name).exists() for name in (*_MARKS, PROJECTOR)):
        return folder
    if path.is_file():
        raise CheckpointError(
            f"{path}: is one file, as earlier versions of xtuner wrote them; "
            "this version reads folders iter_N, which hold the weights in Hugging Face format"
        )
    place = folder if folder.is_dir() else folder.parent
    found = ", ".join(sorted(str(p) for p in place.glob("iter_*") if p.is_dir())) or "none"
    raise CheckpointError(f"{folder}: is no checkpoint; checkpoints in {place}: {found}")


def same_base(one: str, other: str) -> bool:
    """Whether two names (folders, hub names, names that were fetched) mean the same model."""
    return _place(one) == _place(other)


def _place(name: str) -> str:
    folder = Path(name).expanduser()
    found = folder if folder.is_dir() else fetch.cached(name)
    return str(found.resolve()) if found else name


def to_hf(
    checkpoint: Path,
    save_dir: Path,
    *,
    fp32: bool = False,
    max_shard_size: str = "2GB",
    tell: Callable[[str], None] = print,
) -> RunInfo | None:
    """Write `checkpoint` to `save_dir` without what only resuming needs.

    An adapter stays an adapter, in the number type that the run computed in (bfloat16 if that is
    unknown); a model is written in bfloat16, or float16 if the run computed in it, one shard at a
    time.

    Args:
        checkpoint: see `find_checkpoint`.
        save_dir: a new folder.
        fp32: keep float32.
        max_shard_size: of a model, such as '2GB'.
        tell: gets lines of progress.

    Returns:
        What the checkpoint says of its run.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        LaunchError: `save_dir` is taken, or the disk is too full.
    """
    max_bytes = parse_size(max_shard_size)
    source = find_checkpoint(checkpoint)
    info = run_of(source)
    is_adapter = (source / "adapter_config.json").is_file()
    computed = DTYPES.get(info.computed_in if info else "", torch.bfloat16)
    short = computed if is_adapter or computed == torch.float16 else torch.bfloat16
    dtype = torch.float32 if fp32 else short
    weights = Weights.of_adapter(source) if is_adapter else Weights.of_model(source)
    plan = cast_plan(weights.stored, dtype)
    with new_folder(save_dir, num_bytes=total_bytes(plan)) as draft:
        if is_adapter:
            write_adapter(draft, plan, weights)
        else:
            write_shards(draft, plan, weights.__getitem__, max_bytes=max_bytes, tell=tell)
            write_config(source, draft, dtype=dtype)
        copy_others(source, draft, skip=LEFT_OUT)
        if info is not None and source.name in (LLM, LLM_ADAPTER):  # of a LLaVA model: now alone
            kind: Any = "adapter" if is_adapter else "model"
            replace(info, kind=kind, visual_encoder="").write(draft)
    return info


def write_adapter(folder: Path, plan: Mapping[str, Planned], weights: Weights) -> None:
    """Write the tensors of an adapter as `plan` says into one file in `folder`."""
    tensors = {name: weights[name].to(planned.dtype) for name, planned in plan.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
