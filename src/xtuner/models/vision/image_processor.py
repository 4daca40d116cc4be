"""Preprocesses images for the vision tower of a LLaVA model, and counts their tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtuner.errors import ModelError
from xtuner.models.load import located
from xtuner.models.vision.tower import is_clip, num_image_tokens, vision_config

PROCESSOR_FILE = "preprocessor_config.json"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_SIGLIP = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class LlavaImageProcessor:
    """Scales every image to the size of the vision tower (an `ImageProcessor`).

    Attributes:
        upstream: The transformers image processor that does the work, and that other tools load.
        max_tokens: Tokens per image, the same for all images.
    """

    upstream: Any
    max_tokens: int

    @classmethod
    def of_tower(cls, path: str, *, pad_to_square: bool = True) -> LlavaImageProcessor:
        """The image processor of the vision tower at `path`, a folder or a hub name.

        Args:
            path: The vision tower; its ``preprocessor_config.json`` is used if it exists.
            pad_to_square: Pad images to a square instead of cropping their longer side.

        Raises:
            ModelError: The tower's configuration, or its preprocessor's, cannot be read or used.
        """
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        config, own = vision_config(path), _preprocessor_config(path)
        side, clip = int(config.image_size), is_clip(config)
        square = {"height": side, "width": side}
        upstream = LlavaImageProcessorPil(
            do_pad=pad_to_square,
            size={"shortest_edge": side} if clip else square,
            do_center_crop=clip,
            crop_size=square,
            resample=3 if own.get("resample") is None else own["resample"],
            rescale_factor=own.get("rescale_factor") or 1 / 255,
            image_mean=list(own.get("image_mean") or (_CLIP_MEAN if clip else _SIGLIP)),
            image_std=list(own.get("image_std") or (_CLIP_STD if clip else _SIGLIP)),
        )
        return cls(upstream, num_image_tokens(config))

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of an image of `size` pixels (width, height)."""
        return self.max_tokens

    def preprocess(self, image: Any) -> np.ndarray:
        """Pixels ``[3, H, W]`` in float32 of a decoded RGB image."""
        values = self.upstream(images=image, return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)

    def facts(self) -> Mapping[str, Any]:
        """The values that `num_tokens` depends on."""
        return {"tokens_per_image": self.max_tokens}


def _preprocessor_config(path: str) -> dict[str, Any]:
    """The image preprocessing configuration of the tower at `path`; empty if there is none."""
    folder = Path(located(path))
    file: Path | str = folder / PROCESSOR_FILE
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(str(folder), PROCESSOR_FILE)
        except Exception:  # the defaults of CLIP and SigLIP fit all their checkpoints
            return {}
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    _check_preparation(values, str(file))
    return dict(values)


def _check_preparation(values: Any, file: str) -> None:
    """Refuse values that the processor cannot use.

    Raises:
        ModelError: Names the entry.
    """
    if not isinstance(values, dict):
        raise ModelError(f"{file}: must be a JSON object")

    def positive(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    def three(value: Any, *, zero: bool) -> bool:
        return (
            isinstance(value, list)
            and len(value) == 3
            and all(positive(x) or (zero and x == 0 and x is not False) for x in value)
        )

    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "resample": (lambda v: type(v) is int and 0 <= v <= 5, "a number from 0 to 5"),
        "rescale_factor": (positive, "a positive number"),
        "image_mean": (lambda v: three(v, zero=True), "three non-negative numbers"),
        "image_std": (lambda v: three(v, zero=False), "three positive numbers"),
    }
    for name, (fits, allowed) in rules.items():
        if values.get(name) is not None and not fits(values[name]):
            raise ModelError(f"{file}: {name} is {values[name]!r} and must be {allowed}")
