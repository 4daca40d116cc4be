"""Tiny vision towers and images: real architectures, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_vision_tower(kind: str = "clip", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A vision tower of three layers of width 32 with random weights: 28 x 28 pixels, 4 patches.

    Args:
        kind: 'clip' or 'siglip'.
        seed: Seed of the weights; the caller's random state does not change.
        overrides: Fields of the configuration.
    """
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    config: Any
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "siglip":
            config = SiglipVisionConfig(**{**_SIZES, **overrides})
            return SiglipVisionModel(config).eval()  # type: ignore[no-any-return]
        config = CLIPVisionConfig(**{**_SIZES, **overrides})
        return CLIPVisionModel(config).eval()  # type: ignore[no-any-return]


def tiny_vision_tower_folder(folder: Path | str, kind: str = "clip", **options: Any) -> Path:
    """Write `tiny_vision_tower` into `folder` in Hugging Face format and return it."""
    folder = Path(folder)
    tiny_vision_tower(kind, **options).save_pretrained(folder)
    return folder


def tiny_images(folder: Path | str, count: int, *, size: tuple[int, int] = (40, 28)) -> list[str]:
    """Write `count` single-colour images into `folder` and return their names."""
    from PIL import Image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        colour = tuple((number * step) % 256 for step in (97, 57, 31))
        Image.new("RGB", size, colour).save(folder / name)
    return names


def tiny_llava_data(file: Path | str, image_folder: Path | str, *, count: int = 8) -> Path:
    """Write `count` rows in LLaVA's format to `file`, every fourth without an image."""
    file = Path(file)
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(tiny_images(image_folder, count)):
        has_image = number % 4 < 3
        question = f"{'<image>' if has_image else 'No image.'}\nWhich number is this?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"Number {number}." if has_image else "There is none."},
        ]
        rows.append(
            {"id": str(number), **({"image": name} if has_image else {}), "conversations": turns}
        )
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file
