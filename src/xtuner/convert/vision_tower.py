"""Merge the adapter of a vision tower into it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import torch

from xtuner.convert.output import new_folder
from xtuner.convert.to_hf import find_checkpoint
from xtuner.convert.weights import (
    Weights,
    cast_plan,
    main_dtype,
)
from xtuner.device.select import DTYPES, pick_device
from xtuner.errors import CheckpointError, ModelError
from xtuner.models import manifest
from xtuner.models.adapters import load_adapter
from xtuner.models.load import located, quiet_transformers, read_config
from xtuner.models.old_adapters import fitting_encoder_adapter
from xtuner.models.vision import folder as parts_of
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.tower import load_vision_tower


def merge_encoder(
    visual_encoder: str,
    adapter: Path,
    save_dir: Path,
    *,
    dtype: str,
    device: Literal["auto", "cpu", "cuda"],
) -> float:
    """Merge the adapter of a vision tower into it, and save the result.

    Args:
        visual_encoder: CLIP or SigLIP, folder or hub name.
        adapter: A PEFT adapter, or a folder of parts, an ``iter_N`` or a work dir that contains
            one.
        save_dir: A new folder.
        dtype: The dtype of the result; 'auto' is that of the vision tower's files.
        device: Where to merge.

    Returns:
        The largest difference between the outputs before and after merging, in float32 on random
        input, relative to the largest output.

    Raises:
        ModelError: `adapter` is not an adapter, or does not fit.
        LaunchError: `save_dir` is not empty, or the disk space is insufficient.
    """
    folder = _encoder_adapter(adapter)
    manifest.check(folder)
    encoder: Any = load_vision_tower(
        visual_encoder, dtype=torch.float32, device=pick_device(device)
    )
    with fitting_encoder_adapter(folder) as fitting:
        adapted: Any = load_adapter(encoder, fitting).eval()
    size = encoder.config.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, size, size, generator=generator).to(encoder.device)
    with torch.no_grad():
        before = adapted(pixel_values=pixels).last_hidden_state
        merged = adapted.merge_and_unload()
        after = merged(pixel_values=pixels).last_hidden_state
    difference = float((before - after).abs().max() / before.abs().max())
    merged = merged.to(DTYPES.get(dtype) or _dtype_of(located(visual_encoder)))
    size = sum(p.nbytes for p in merged.parameters())
    with new_folder(save_dir, num_bytes=size) as draft:
        with quiet_transformers():
            merged.save_pretrained(str(draft))
        LlavaImageProcessor.of_tower(visual_encoder).upstream.save_pretrained(str(draft))
    return difference


def _encoder_adapter(given: Path) -> Path:
    """The folder of the adapter in `given`."""
    if (given / "adapter_config.json").is_file():
        return given
    with contextlib.suppress(CheckpointError):
        folder = find_checkpoint(given)
        if (folder / parts_of.ENCODER_ADAPTER).is_dir():
            return folder / parts_of.ENCODER_ADAPTER
    raise ModelError(
        f"{given}: is not an adapter of a vision tower (no adapter_config.json) and contains "
        f"none; give a folder {parts_of.ENCODER_ADAPTER}/, or the iter_N or work dir around it"
    )


def _dtype_of(name: str) -> torch.dtype:
    """The dtype of the weights of the model `name`; for a hub name, that of its config.json."""
    if Path(name).is_dir():
        return main_dtype(cast_plan(Weights.of_model(Path(name)).stored, None))
    config = read_config(name)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
