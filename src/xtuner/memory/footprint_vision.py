"""How much memory the eyes of a model take in a training step, found as `footprint` finds the rest.

weights   encoder + projector + adapters
step      what waits for the backward pass while the language model runs, and the highest peak
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from xtuner.config.schema import Settings
from xtuner.memory.footprint import Footprint
from xtuner.memory.live_bytes import LiveBytes, pretend_cpu
from xtuner.models import adapters
from xtuner.models.load import quiet_transformers
from xtuner.models.vision.parts import used_layers, with_adapter
from xtuner.models.vision.tower import check_layer, select, vision_config


@dataclass(frozen=True)
class VisionFootprint:
    """Bytes and counts of encoder and projector.

    Attributes:
        weights: as they are held.
        waiting: alive while the language model runs.
        peak: highest while the eyes run.
        gradients: of trained weights; part of `peak`.
        trainable, parameters: numbers.
    """

    weights: int
    waiting: int
    peak: int
    gradients: int
    trainable: int
    parameters: int

    def beside(self, llm: Footprint, *, accumulate: bool) -> Footprint:
        """The footprint of language model and eyes together; `accumulate`: gradients of an
        earlier micro-batch are there already, as in `llm`."""
        earlier = accumulate * self.gradients
        step = max(llm.step + self.waiting + earlier, llm.gradients + self.peak + self.gradients)
        return replace(
            llm,
            weights=llm.weights + self.weights,
            step=step,
            gradients=llm.gradients + self.gradients,
            trainable=llm.trainable + self.trainable,
            parameters=llm.parameters + self.parameters,
        )


def tokens_each(path: str) -> int:
    """Tokens that an image takes with the vision tower at `path`.

    Raises:
        ModelError: its configuration cannot be had.
    """
    config = vision_config(path)
    return int((config["image_size"] // config["patch_size"]) ** 2)


def measure_vision(
    settings: Settings, *, images: int, width: int, dtype: torch.dtype
) -> VisionFootprint:
    """Send `images` through encoder and projector without weights.

    Args:
        settings: of the run.
        images: in a micro-batch.
        width: of the language model.
        dtype: of the computation, and of frozen weights.

    Raises:
        ModelError: the encoder's configuration cannot be had, or has no such layer.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert settings.visual_encoder_name_or_path is not None
    config = vision_config(settings.visual_encoder_name_or_path)
    training = settings.visual_encoder_training
    check_layer(
        settings.visual_select_layer,
        layers=config["num_hidden_layers"],
        adapters=training == "adapter",
    )
    stored = torch.float32 if training == "full" else dtype
    encoder = _build(config, stored)
    encoder.requires_grad_(False)
    if training == "full":
        for part in used_layers(encoder, settings.visual_select_layer):
            part.requires_grad_(True)
    elif training == "adapter":
        encoder = with_adapter(encoder, settings)
    with torch.device("meta"):
        projector = nn.Sequential(
            nn.Linear(config["hidden_size"], width), nn.GELU(), nn.Linear(width, width)
        )
    both = nn.ModuleList([encoder, projector])
    held = [(p.numel() * p.element_size(), p.requires_grad) for p in both.parameters()]
    trainable, parameters = adapters.count_parameters(both)
    mixed = dtype != torch.float32
    size, strategy = config["image_size"], "full" if "siglip" in config["model_type"] else "default"
    counter = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_cpu(both)
        pixels = torch.empty(images, 3, size, size, dtype=stored)
        with counter, torch.autocast("cpu", dtype=dtype if mixed else None, enabled=mixed):
            with torch.set_grad_enabled(training != "frozen"):
                tower: Any = encoder
                states = tower(pixels, output_hidden_states=True).hidden_states
                features = select(states, settings.visual_select_layer, strategy)
            del states
            seen = projector(features)
            waiting = counter.live
            seen.float().sum().backward()
    gradients = sum(size for size, trained in held if trained)
    return VisionFootprint(
        weights=sum(size for size, _ in held),
        waiting=waiting + pixels.numel() * 4,
        peak=max(counter.history) + pixels.numel() * 4 - gradients,
        gradients=gradients,
        trainable=trainable,
        parameters=parameters,
    )


def _build(values: dict[str, Any], dtype: torch.dtype) -> Any:
    from transformers import (
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    siglip = values["model_type"] == "siglip_vision_model"
    config: Any = (SiglipVisionConfig if siglip else CLIPVisionConfig)(**values)
    with torch.device("meta"), quiet_transformers():
        return (SiglipVisionModel if siglip else CLIPVisionModel)(config).to(dtype)
