"""Vision towers of CLIP or SigLIP; one of their layers gives the features of an image.

pixels [P, 3, H, W] ──tower, layer -2, without CLS──► features [P, T, C]
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from xtuner.errors import ModelError, count, listed
from xtuner.models.load import located, quiet_transformers, read_config, readable_errors
from xtuner.types import IMAGE

Strategy = Literal["default", "full"]
"""transformers' terms: 'default' drops the first feature, CLS; 'full' keeps all."""

_CLIP = ("clip", "clip_vision_model")
_SIGLIP = ("siglip", "siglip_vision_model")


def load_vision_tower(
    path: str | Path, *, dtype: torch.dtype, device: str = "cpu"
) -> PreTrainedModel:
    """Load the vision part of the CLIP or SigLIP model at `path` (a folder or a hub name).

    Raises:
        ModelError: It does not exist, has another type, or lacks weights.
    """
    from transformers import CLIPVisionModel, SiglipVisionModel

    source = located(path)
    kind = read_config(source).get("model_type")
    if kind not in (*_CLIP, *_SIGLIP):
        raise ModelError(
            f"visual_encoder_name_or_path = {str(path)!r}: is of type {kind!r}; it must be one of "
            f"{', '.join((*_CLIP, *_SIGLIP))}"
        )
    loader = CLIPVisionModel if kind in _CLIP else SiglipVisionModel
    with readable_errors(path, "vision tower"), quiet_transformers():
        model, info = loader.from_pretrained(source, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        headline = f"{path}: the vision tower lacks {count(len(missing), 'weight')}"
        raise ModelError(listed(headline, missing[:8]))
    return model.to(device)  # type: ignore[no-any-return]


def check_layer(layer: int, *, layers: int, adapters: bool = False) -> None:
    """Refuse a `visual_select_layer` that a tower with this number of `layers` does not have.

    Args:
        layer: The layer whose output is used; 0 is the input of the first layer.
        layers: Number of layers of the encoder.
        adapters: Whether the layers up to it get adapters.

    Raises:
        ModelError: There is no such layer, or no layer up to it for adapters.
    """
    if not -layers - 1 <= layer <= layers:
        raise ModelError(
            f"visual_select_layer = {layer}: the vision tower has {count(layers, 'layer')}, so it "
            f"must be from {-layers - 1} to {layers}"
        )
    if adapters and layer in (0, -layers - 1):
        raise ModelError(
            f"visual_select_layer = {layer}: no layer of the vision tower is used, so none can "
            "have adapters; set visual_encoder_lora_r = None, or choose a later layer"
        )


def strategy_of(vision_config: Any) -> Strategy:
    """'default' if the tower puts CLS before the patches, otherwise 'full'."""
    return "default" if is_clip(vision_config) else "full"


def is_clip(vision_config: Any) -> bool:
    """Whether the tower is CLIP's; otherwise it is SigLIP's."""
    return vision_config.model_type in _CLIP


def num_image_tokens(vision_config: Any) -> int:
    """Tokens per image, one per patch; images of any size are scaled to the tower's size."""
    return int(vision_config.image_size // vision_config.patch_size) ** 2


def select(hidden_states: Any, layer: int, strategy: str) -> Tensor:
    """The features ``[P, T, C]`` among all hidden states of the tower."""
    chosen: Tensor = hidden_states[layer]
    return chosen[:, 1:] if strategy == "default" else chosen


def vision_config(path: str) -> Any:
    """The transformers configuration of the vision tower at `path`, without its weights.

    Raises:
        ModelError: It cannot be read, or is neither CLIP nor SigLIP.
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
    return (CLIPVisionConfig if kind in _CLIP else SiglipVisionConfig)(**own)


def identity_of(encoder: PreTrainedModel) -> str:
    """A hash of everything except the image that the features of `encoder` depend on: its weights,
    their dtype and its configuration, but not its path."""
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
    """Add ``<image>`` to `tokenizer` as one token and return its id."""
    if IMAGE not in tokenizer.get_vocab():
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    return int(tokenizer.convert_tokens_to_ids(IMAGE))
