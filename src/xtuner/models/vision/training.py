"""A LLaVA model in training: which parts are trained, and how they are saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.config.schema import Settings
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.prepare import autocast_dtype, llm_autocast
from xtuner.models.save import save_model
from xtuner.models.vision import folder as layout
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.llava import KeepFeatures, LlavaEmbedder, assemble
from xtuner.models.vision.tower import load_vision_tower


@dataclass
class LlavaTraining:
    """A LLaVA model in training.

    Attributes:
        packed: The model that the algorithms use.
        embedder: Embeds images.
        llm, encoder: The language model and the vision tower, in a PEFT wrapper if they have
            adapters.
        settings: Determine what is trained.
        processor: The image processor; saved with a vision tower that is trained in full.
    """

    packed: PackedCausalLM
    embedder: LlavaEmbedder
    llm: Any
    encoder: Any
    settings: Settings
    processor: LlavaImageProcessor

    @property
    def llava(self) -> Any:
        """The assembled model."""
        return self.packed.model

    def save(self, folder: Path, trained: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained parts.

        Args:
            folder: The folder of the parts.
            trained: Weights that replace the model's own, by their names in `llava`.
        """
        own = self.llava.named_parameters()
        values = {id(p): trained[name] for name, p in own if trained and name in trained}
        projector = _values_of(self.llava.model.multi_modal_projector, values)
        layout.save_projector(self.llava, folder / layout.PROJECTOR, trained=projector)
        for model, training, adapter, full in (
            (self.llm, self.settings.llm_training, layout.LLM_ADAPTER, layout.LLM),
            (
                self.encoder,
                self.settings.visual_encoder_training,
                layout.ENCODER_ADAPTER,
                layout.ENCODER,
            ),
        ):
            if training != "frozen":
                target = folder / (adapter if training == "adapter" else full)
                save_model(model, target, trained=_values_of(model, values))
        if self.settings.visual_encoder_training == "full":
            self.processor.upstream.save_pretrained(folder / layout.ENCODER)

    def saved_in_full(self) -> Iterator[Any]:
        """The models of which `save` writes every weight, trained or not."""
        if self.settings.llm_training == "full":
            yield self.llm
        if self.settings.visual_encoder_training == "full":
            yield self.encoder

    def table(self) -> Iterator[str]:
        """What is trained of each part, one line per part."""
        model, s = self.llava.model, self.settings
        llm = (model.language_model, self.llava.lm_head)
        rows = (
            ("projector", model.multi_modal_projector, "full"),
            ("language model", llm, s.llm_training),
            ("vision tower", model.vision_tower, s.visual_encoder_training),
        )
        for name, modules, how in rows:
            holder = nn.ModuleList(modules if isinstance(modules, tuple) else [modules])
            trained, everything = adapters.count_parameters(holder)
            words = {"full": "all its weights", "adapter": "adapters", "frozen": "frozen"}[how]
            yield f"{name:<16}{trained:>14,} of {everything:>14,} trained   {words}"


def _values_of(part: nn.Module, values: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Convert `values` from keys by parameter id to the names in `part`."""
    named = part.named_parameters(remove_duplicate=False)
    return {name: values[id(p)] for name, p in named if id(p) in values}


def make(
    settings: Settings,
    llm: Any,
    *,
    image_token_id: int,
    dtype: torch.dtype,
    device: str,
    source: Path | None = None,
    projector: Path | None = None,
    keep: KeepFeatures | None = None,
) -> LlavaTraining:
    """Connect `llm` (from `make_trainable`) to the vision tower according to `settings`.

    Args:
        llm: The language model, or a PeftModel around it.
        image_token_id: The token ``<image>``.
        dtype: The dtype of the computation and of frozen weights.
        source: The checkpoint to resume from.
        projector: The projector to start from if there is no `source`.
        keep: Stores features of a frozen vision tower.

    Raises:
        ModelError: The parts do not fit together.
    """
    assert settings.visual_encoder_name_or_path is not None
    training = settings.visual_encoder_training
    name = settings.visual_encoder_name_or_path
    path = source / layout.ENCODER if training == "full" and source is not None else name
    encoder: Any = load_vision_tower(path, dtype=tower_dtype(settings, dtype), device=device)
    llava = assemble(
        llm.get_base_model() if hasattr(llm, "get_base_model") else llm,
        encoder,
        image_token_id=image_token_id,
        select_layer=settings.visual_select_layer,
        seed=settings.seed,
    )
    encoder = make_tower_trainable(encoder, settings)
    if (start := source or projector) is not None:
        layout.load_projector(llava, start)
    if source is not None and training == "adapter":
        adapters.load_adapter_weights(encoder, source / layout.ENCODER_ADAPTER)
    embedder = LlavaEmbedder(
        llava, train_encoder=training != "frozen", autocast=autocast_dtype(dtype), keep=keep
    )
    packed = PackedCausalLM(llava, autocast=llm_autocast(settings, dtype), embedder=embedder)
    processor = LlavaImageProcessor.of_tower(name, pad_to_square=settings.pad_image_to_square)
    return LlavaTraining(packed, embedder, llm, encoder, settings, processor)


def tower_dtype(settings: Settings, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a run that computes in `dtype` stores the vision tower's weights."""
    return torch.float32 if settings.visual_encoder_training == "full" else dtype


def make_tower_trainable(encoder: Any, settings: Settings) -> Any:
    """Freeze the vision tower, then enable training according to `settings`: nothing, all used
    weights, or adapters. Returns the tower, in a PEFT wrapper if it has adapters."""
    encoder.requires_grad_(False)
    if settings.visual_encoder_training == "adapter":
        return _with_adapter(encoder, settings)
    if settings.visual_encoder_training == "full":
        for part in _used_layers(encoder, settings.visual_select_layer):
            part.requires_grad_(True)
    return encoder


def _used_layers(encoder: Any, select_layer: int) -> list[nn.Module]:
    """The parts of the vision tower up to the selected layer; the others never get gradients."""
    count = select_layer if select_layer >= 0 else len(encoder.encoder.layers) + 1 + select_layer
    before = [encoder.embeddings, getattr(encoder, "pre_layrnorm", None)]
    return [part for part in (*before, *encoder.encoder.layers[:count]) if part is not None]


def _with_adapter(encoder: Any, settings: Settings) -> Any:
    """The vision tower with adapters on the linear layers that are used."""
    paths = {id(module): name for name, module in encoder.named_modules()}
    targets = [
        paths[id(module)]
        for layer in _used_layers(encoder, settings.visual_select_layer)
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    ]
    return adapters.add_adapter(
        encoder,
        r=settings.visual_encoder_lora_r or 1,
        alpha=settings.visual_encoder_lora_alpha,
        dropout=settings.visual_encoder_lora_dropout,
        target_modules=targets,
        seed=settings.seed + 1,
        task_type=None,
    )
