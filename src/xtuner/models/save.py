"""Write a model or an adapter in Hugging Face format, and make sure that it is on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xtuner.models.load import quiet_transformers


def save_model(
    model: Any,
    folder: Path,
    *,
    trained: Mapping[str, Tensor] | None = None,
    max_shard_size: str = "2GB",
) -> None:
    """Write `model` (or, for a PeftModel, its adapter alone) into `folder` as safetensors.

    Args:
        model: of transformers, or a PeftModel.
        folder: gets the files.
        trained: weights that take the place of the model's own, by name; with adapters all that are
            trained.
        max_shard_size: of the files of a model.
    """
    with quiet_transformers():
        if hasattr(model, "get_base_model"):
            # "auto" would look the base model up to see whether its vocabulary grew; ours never
            # does.
            state = dict(trained) if trained else None
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's model card, all blanks
        else:
            state = {**model.state_dict(), **trained} if trained else None
            model.save_pretrained(str(folder), max_shard_size=max_shard_size, state_dict=state)


def weight_files(folder: Path) -> list[Path]:
    """The files of `folder` that hold weights."""
    return sorted(folder.glob("*.safetensors"))


def flush_tree(folder: Path) -> None:
    """Have the disk hold every file of `folder`, and let all who read the folder read them."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)  # safetensors lets nobody but the owner read its files
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have the disk hold one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
