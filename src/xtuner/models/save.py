"""Writes a model or an adapter in Hugging Face format and flushes it to disk."""

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
    """Write `model` (only the adapter of a PeftModel) to `folder` as safetensors. The weights
    `trained`, by name, replace the model's own; for an adapter these are all."""
    with quiet_transformers():
        if hasattr(model, "get_base_model"):
            # "auto" would look up the base model to see whether its vocabulary grew, which it never
            # does.
            state = dict(trained) if trained else None
            model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        else:
            state = {**model.state_dict(), **trained} if trained else None
            model.save_pretrained(str(folder), max_shard_size=max_shard_size, state_dict=state)


def flush_tree(folder: Path) -> None:
    """Flush every file in `folder` to disk, and make it readable for everyone who can read the
    folder."""
    readable = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(readable)  # safetensors makes its files readable only by the owner
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Flush one file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
