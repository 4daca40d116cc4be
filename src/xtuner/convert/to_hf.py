"""Convert a checkpoint to a PEFT adapter or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.convert.internlm2_adapter import original_adapter
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
from xtuner.errors import CheckpointError, shell_command
from xtuner.hub.json_files import write_object
from xtuner.hub.links import refuse_links_out
from xtuner.hub.weight_files import tensors_of
from xtuner.models import manifest, original
from xtuner.models.adapter_config import read_adapter_config
from xtuner.models.load import read_config
from xtuner.models.references import checkpoint_of
from xtuner.models.run_info import RunInfo
from xtuner.models.vision.folder import LLM, LLM_ADAPTER, PROJECTOR, run_of

_MARKS = ("adapter_config.json", "config.json")
LEFT_OUT = (
    "training_state.pt", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json"
)  # fmt: skip
"""Files that are not copied: training state, and weights that are written again."""


def find_checkpoint(path: Path) -> Path:
    """Resolve `path` to a checkpoint folder.

    Args:
        path: An ``iter_N``, an ``iter_N.pth`` as in scripts of earlier versions, or a work dir (its
            newest checkpoint).

    Raises:
        CheckpointError: There is no checkpoint.
    """
    folder, path = checkpoint_of(path), path.expanduser()
    if any((folder / name).exists() for name in (*_MARKS, PROJECTOR)):
        return folder
    if path.is_file():
        raise CheckpointError(
            f"{path}: is a checkpoint of XTuner 0.x; convert it first, with the config of its run: "
            f"{shell_command('xtuner', 'convert', 'pth_to_hf', 'CONFIG', path, 'DIR')}"
        )
    parent = folder if folder.is_dir() else folder.parent
    found = ", ".join(sorted(str(p) for p in parent.glob("iter_*") if p.is_dir())) or "none"
    raise CheckpointError(f"{folder}: is not a checkpoint; checkpoints in {parent}: {found}")


def to_hf(
    checkpoint: Path,
    save_dir: Path,
    *,
    fp32: bool = False,
    max_shard_size: str = "2GB",
    log: Callable[[str], None] = print,
) -> RunInfo | None:
    """Write `checkpoint` to `save_dir` without training state.

    An adapter stays an adapter, in the number type of the run's computation (bfloat16 if unknown).
    A model is written in bfloat16, or in float16 if the run computed in float16, one shard at a
    time.

    Args:
        checkpoint: See `find_checkpoint`.
        save_dir: A new folder.
        fp32: Save in float32.
        max_shard_size: Maximum size of a file of a model, such as '2GB'.
        log: Receives progress messages.

    Returns:
        The run.yaml of the checkpoint, if any.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        LaunchError: `save_dir` is not empty, or the disk space is insufficient.
    """
    max_bytes = parse_size(max_shard_size)
    source = find_checkpoint(checkpoint)
    manifest.check(source)
    refuse_links_out(source)
    info = run_of(source)
    is_adapter = (source / "adapter_config.json").is_file()
    if is_adapter:
        read_adapter_config(source)
    computed = DTYPES.get(info.computed_in if info else "", torch.bfloat16)
    short_dtype = computed if is_adapter or computed == torch.float16 else torch.bfloat16
    dtype = torch.float32 if fp32 else short_dtype
    weights = Weights.of_adapter(source) if is_adapter else Weights.of_model(source)
    plan = cast_plan(weights.stored, dtype)
    with new_folder(save_dir, num_bytes=total_bytes(plan)) as draft:
        if is_adapter:
            write_adapter(draft, plan, weights)
        else:
            write_shards(draft, plan, weights.__getitem__, max_bytes=max_bytes, log=log)
            write_config(source, draft, dtype=dtype)
        copy_others(source, draft, skip=LEFT_OUT)
        if is_adapter and info is not None:
            _restore_layers(draft, info)
        if info is not None:
            written = info
            if source.name in (LLM, LLM_ADAPTER):  # part of a LLaVA model
                kind: Any = "adapter" if is_adapter else "model"
                written = replace(info, kind=kind, visual_encoder="")
            written.without_local_paths().write(draft)
    return info


def _restore_layers(folder: Path, info: RunInfo) -> None:
    """Give an adapter in `folder` the layers of its base model's own code."""
    base = original.folder_of(info.base_model)
    if base is None:
        return
    file = folder / "adapter_model.safetensors"
    config = read_adapter_config(folder)
    found = original_adapter(config, tensors_of(file), read_config(str(base)))
    if found is None:
        return
    config, tensors = found
    save_file(tensors, str(file), metadata={"format": "pt"})
    write_object(folder / "adapter_config.json", config)


def write_adapter(folder: Path, plan: Mapping[str, Planned], weights: Weights) -> None:
    """Write the tensors of an adapter, cast as in `plan`, to one file in `folder`."""
    tensors = {name: weights[name].to(planned.dtype) for name, planned in plan.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
