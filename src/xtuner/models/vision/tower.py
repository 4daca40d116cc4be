"""The eyes of a language model: a vision tower, and how its images are prepared.

image ──processor──► pixels [3, H, W] ──encoder, layer -2, without CLS──► features [T, C]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xtuner.errors import ModelError, listed
from xtuner.models.load import located, quiet_transformers, read_config, readable_errors
from xtuner.types import IMAGE

Strategy = Literal["default", "full"]
"""transformers' words: 'default' drops the first feature, CLS; 'full' keeps all."""

_CLIP = ("clip", "clip_vision_model")
_SIGLIP = ("siglip", "siglip_vision_model")
_MEANS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
PROCESSOR_FILE = "preprocessor_config.json"


def load_vision_tower(
    path: str | Path, *, dtype: torch.dtype, device: str = "cpu"
) -> PreTrainedModel:
    """Load the vision part of the CLIP or SigLIP model at `path` (a folder or a hub name).

    Raises:
        ModelError: it is not there, is of another kind, or lacks weights.
    """
    from transformers import CLIPVisionModel, SiglipVisionModel

    place = located(path)
    kind = read_config(place).get("model_type")
    if kind not in (*_CLIP, *_SIGLIP):
        raise ModelError(
            f"visual_encoder_name_or_path = {str(path)!r}: is of type {kind!r}; it must be one of "
            f"{', '.join((*_CLIP, *_SIGLIP))}"
        )
    loader = CLIPVisionModel if kind in _CLIP else SiglipVisionModel
    with readable_errors(path, "vision tower"), quiet_transformers():
        model, info = loader.from_pretrained(place, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        headline = f"{path}: {len(missing)} weights of the vision tower are missing"
        raise ModelError(listed(headline, missing[:8]))
    return model.to(device)  # type: ignore[no-any-return]


def check_layer(layer: int, *, layers: int, adapters: bool = False) -> None:
    """Refuse a `visual_select_layer` that an encoder of so many `layers` does not have.

    Args:
        layer: whose output is used; 0 is before the first.
        layers: of the encoder.
        adapters: whether layers before it get some.

    Raises:
        ModelError: there is no such layer, or none before it for adapters.
    """
    if not -layers - 1 <= layer <= layers:
        raise ModelError(
            f"visual_select_layer = {layer}: the vision tower has {layers} layers, so it must be "
            f"from {-layers - 1} to {layers}"
        )
    if adapters and layer in (0, -layers - 1):
        raise ModelError(
            f"visual_select_layer = {layer}: no layer of the vision tower is used, so none can "
            "have adapters; set visual_encoder_lora_r = None, or choose a layer behind"
        )


def strategy_of(vision_config: Any) -> Strategy:
    """'default' where the encoder puts CLS before the patches, else 'full'."""
    return "default" if vision_config.model_type in _CLIP else "full"


def num_image_tokens(vision_config: Any) -> int:
    """Tokens that an image takes: one a patch."""
    return int(vision_config.image_size // vision_config.patch_size) ** 2


def select(hidden_states: Any, layer: int, strategy: str) -> Tensor:
    """The features ``[P, T, C]`` out of all hidden states of the encoder."""
    chosen: Tensor = hidden_states[layer]
    return chosen[:, 1:] if strategy == "default" else chosen


@dataclass(frozen=True)
class Processor:
    """Makes pixels of decoded images.

    Attributes:
        encoder: folder or hub name of the vision tower, for its ``preprocessor_config.json``.
        pad_to_square: fill images up to a square instead of cutting their long sides off.
    """

    encoder: str
    pad_to_square: bool = True

    @cached_property
    def upstream(self) -> Any:
        """transformers' processor that does the work, and that other tools will load."""
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        config = vision_config(self.encoder)
        side = int(config["image_size"])
        own = self._own_file()
        clip = config["model_type"] in _CLIP
        mean, std = _MEANS["clip" if clip else "siglip"]
        square = {"height": side, "width": side}
        return LlavaImageProcessorPil(
            do_pad=self.pad_to_square,
            size={"shortest_edge": side} if clip else square,
            do_center_crop=clip,
            crop_size=square,
            resample=3 if own.get("resample") is None else own["resample"],
            rescale_factor=own.get("rescale_factor") or 1 / 255,
            image_mean=list(own.get("image_mean") or mean),
            image_std=list(own.get("image_std") or std),
        )

    def __call__(self, image: Any) -> np.ndarray:
        """Pixels ``[3, H, W]`` in float32 of a decoded RGB image."""
        values = self.upstream(images=image, return_tensors="np")["pixel_values"]
        return np.asarray(values[0], dtype=np.float32)

    def _own_file(self) -> dict[str, Any]:
        """What the encoder says of the preparation of its images; empty where it says nothing."""
        place = Path(located(self.encoder))
        file: Path | str = place / PROCESSOR_FILE
        if not place.is_dir():
            from huggingface_hub import hf_hub_download

            try:
                file = hf_hub_download(str(place), PROCESSOR_FILE)
            except Exception:  # the defaults of CLIP and SigLIP serve all their checkpoints
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
    """Refuse what a processor could not work with.

    Raises:
        ModelError: names the entry.
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
        "image_mean": (lambda v: three(v, zero=True), "three numbers, none below 0"),
        "image_std": (lambda v: three(v, zero=False), "three positive numbers"),
    }
    for name, (fits, allowed) in rules.items():
        if values.get(name) is not None and not fits(values[name]):
            raise ModelError(f"{file}: {name} is {values[name]!r} and must be {allowed}")


def vision_config(path: str) -> dict[str, Any]:
    """What config.json says of the vision part of the encoder at `path`, with all defaults.

    Raises:
        ModelError: it cannot be read, or is neither CLIP nor SigLIP.
    """
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    values = read_config(located(path))
    kind = values.get("model_type")
    if kind not in (*_CLIP, *_SIGLIP):
        found = f"is of type {kind!r}" if values else "has no config.json that can be read"
        raise ModelError(
            f"visual_encoder_name_or_path = {path!r}: {found}; it must be a model of type "
            f"{' or '.join((*_CLIP, *_SIGLIP))}"
        )
    own = values.get("vision_config", values)
    config: Any = (CLIPVisionConfig if kind in _CLIP else SiglipVisionConfig)(**own)
    return {**config.to_dict(), "model_type": config.model_type}


def identity_of(encoder: PreTrainedModel) -> str:
    """A hash of all that the features of the loaded `encoder` depend on besides the image: its
    weights, their number type, and its configuration; not where it came from."""
    values = encoder.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures"):
        values.pop(name, None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def add_image_token(tokenizer: Any) -> int:
    """Make ``<image>`` one token of `tokenizer` and return its id."""
    if IMAGE not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return int(tokenizer.convert_tokens_to_ids(IMAGE))
