"""The memory of vision tower and projector in a training step, measured as in `footprint`.

weights   tower + projector + adapters
step      what is kept for the backward pass while the language model runs, and the peak
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
from xtuner.models.prepare import autocast_dtype
from xtuner.models.vision.tower import check_layer, is_clip, select, strategy_of, vision_config
from xtuner.models.vision.training import make_tower_trainable, tower_dtype


@dataclass(frozen=True)
class VisionFootprint:
    """Bytes and counts of vision tower and projector.

    Attributes:
        weights: Bytes of all weights as stored.
        waiting: Bytes alive while the language model runs.
        peak: Peak while the two run.
        gradients: Bytes of all gradients; part of `peak`.
        trainable, parameters: Number of trained and of all parameters.
    """

    weights: int
    waiting: int
    peak: int
    gradients: int
    trainable: int
    parameters: int

    def beside(self, llm: Footprint, *, accumulate: bool) -> Footprint:
        """The footprint of all parts together; `accumulate` means that gradients of an earlier
        micro-batch exist, as in `llm`."""
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


def measure_vision(
    settings: Settings, *, images: int, width: int, dtype: torch.dtype
) -> VisionFootprint:
    """Run vision tower and projector on `images` without weights.

    Args:
        images: Number of images in a micro-batch.
        width: Width of the language model.
        dtype: The dtype of the computation and of frozen weights.

    Raises:
        ModelError: The tower's configuration cannot be read, or it lacks the selected layer.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert settings.visual_encoder_name_or_path is not None
    config = vision_config(settings.visual_encoder_name_or_path)
    training = settings.visual_encoder_training
    check_layer(
        settings.visual_select_layer,
        layers=config.num_hidden_layers,
        adapters=training == "adapter",
    )
    stored = tower_dtype(settings, dtype)
    tower = make_tower_trainable(_meta_tower(config, stored), settings)
    with torch.device("meta"):
        projector = nn.Sequential(
            nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
    both = nn.ModuleList([tower, projector])
    held = [(p.nbytes, p.requires_grad) for p in both.parameters()]
    trainable, parameters = adapters.count_parameters(both)
    mixed, size = autocast_dtype(dtype), config.image_size
    counter = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True):
        pretend_cpu(both)
        pixels = torch.empty(images, 3, size, size, dtype=stored)
        with counter, torch.autocast("cpu", dtype=mixed, enabled=mixed is not None):
            with torch.set_grad_enabled(training != "frozen"):
                states = tower(pixels, output_hidden_states=True).hidden_states
                features = select(states, settings.visual_select_layer, strategy_of(config))
            del states
            vectors = projector(features)
            waiting = counter.live
            vectors.float().sum().backward()
    gradients = sum(size for size, trained in held if trained)
    return VisionFootprint(
        weights=sum(size for size, _ in held),
        waiting=waiting + pixels.numel() * 4,
        peak=max(counter.history) + pixels.numel() * 4 - gradients,
        gradients=gradients,
        trainable=trainable,
        parameters=parameters,
    )


def _meta_tower(config: Any, dtype: torch.dtype) -> Any:
    from transformers import CLIPVisionModel, SiglipVisionModel

    with torch.device("meta"), quiet_transformers():
        return (CLIPVisionModel if is_clip(config) else SiglipVisionModel)(config).to(dtype)
