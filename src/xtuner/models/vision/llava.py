"""LLaVA (arXiv:2304.08485, 2310.03744): a language model with a vision tower and a projector.

    pixels ──vision tower──► features ──linear, gelu, linear──► vectors of the LLM's width
    token ids ──embedding──► vectors, those of <image> replaced ──► the language model's layers

The model is transformers' `LlavaForConditionalGeneration`, assembled from parts that were loaded
(quantized, with adapters) as for text. ``<image>`` is never looked up in the embedding, so the
language model keeps its vocabulary during training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, LlavaConfig, PreTrainedModel
from transformers import LlavaForConditionalGeneration as Llava

from xtuner.errors import ModelError, first_line
from xtuner.models.check.verification import LOGIT_CHANGES
from xtuner.models.vision.tower import check_layer, num_image_tokens, select, strategy_of
from xtuner.types import Batch, BatchImages


def portable_config(decoder: Any) -> Any:
    """The configuration of a language model's layers for plain transformers: xtuner's families that
    are Llama under another name become Llama."""
    config = decoder.config
    ours = isinstance(decoder, LlamaModel) and type(config) is not LlamaConfig
    if not (ours and isinstance(config, LlamaConfig)):
        return copy.deepcopy(config)
    values = LlamaConfig.to_dict(config)
    kept = LlamaConfig().to_dict()
    return LlamaConfig(**{k: v for k, v in values.items() if k in kept and k != "model_type"})


def assemble(
    llm: PreTrainedModel,
    visual_encoder: PreTrainedModel,
    *,
    image_token_id: int,
    select_layer: int = -2,
    seed: int = 0,
) -> Llava:
    """Assemble a LLaVA model from a language model and a vision tower, with a new projector.

    The parts are not copied; the projector is float32 on the language model's device.

    Raises:
        ModelError: LLaVA does not support this language model, or the layer does not exist.
    """
    check_layer(select_layer, layers=visual_encoder.config.num_hidden_layers)
    config = LlavaConfig(
        vision_config=visual_encoder.config,
        text_config=portable_config(llm.base_model),
        image_token_index=image_token_id,
        image_seq_length=num_image_tokens(visual_encoder.config),
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=strategy_of(visual_encoder.config),
    )
    try:
        with torch.device("meta"):
            model = Llava(config)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"{type(llm).__name__} cannot be the language model of a LLaVA: {first_line(error)}"
        ) from error
    config.text_config, config.vision_config = llm.config, visual_encoder.config
    model.model.language_model = llm.base_model
    model.model.vision_tower = visual_encoder
    model.lm_head = llm.get_output_embeddings()
    projector = model.model.multi_modal_projector.to_empty(device=llm.device).float()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for linear in (projector.linear_1, projector.linear_2):
            linear.reset_parameters()
    model.generation_config = llm.generation_config
    _refuse_other_logits(llm, model)
    return model  # type: ignore[no-any-return]


@torch.no_grad()
def _refuse_other_logits(llm: Any, model: Llava) -> None:
    """Raise if `llm` changes its logits after the head, which LLaVA would omit."""
    names = [n for n in LOGIT_CHANGES if getattr(llm.config, n, None) not in (None, 1.0)]
    if not names and type(llm.get_output_embeddings()) is nn.Linear:
        return
    raise ModelError(
        f"{type(llm).__name__} changes its logits after the output head "
        f"({', '.join(names) or 'a head of its own kind'}), which LLaVA omits: use another "
        f"language model"
    )


def decoder_of(model: Any) -> Any:
    """The text decoder of `model`: a LLaVA's language model, otherwise `model` without its PEFT
    wrapper."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.language_model if isinstance(base, Llava) else base


KeepFeatures = Callable[[str, Tensor], None]
"""Stores the features of the image with this key for later epochs."""


class LlavaEmbedder(nn.Module):
    """Computes the input embeddings of a LLaVA model (an `ImageEmbedder`).

    Args:
        train_encoder: Whether gradients reach the vision tower.
        autocast: Dtype of matmuls with float32 weights (projector, a fully trained tower).
        keep: Called with the features of every image that has a key.
    """

    def __init__(
        self,
        llava: Llava,
        *,
        train_encoder: bool = False,
        autocast: torch.dtype | None = None,
        keep: KeepFeatures | None = None,
    ) -> None:
        super().__init__()
        self._llava = (llava,)  # in a tuple: the parameters are registered elsewhere
        self.train_encoder, self.autocast, self.keep = train_encoder, autocast, keep

    @property
    def llava(self) -> Any:
        """The assembled model."""
        return self._llava[0]

    def features(self, pixel_values: Sequence[Tensor] | Tensor) -> Tensor:
        """The vision tower's output ``[P, T, C]`` for P images ``[3, H, W]``."""
        tower: Any = self.llava.model.vision_tower
        config = self.llava.config
        weight = next(tower.parameters())
        pixels = torch.stack(tuple(pixel_values)).to(weight.device, weight.dtype)
        grad = torch.is_grad_enabled() and self.train_encoder
        with torch.set_grad_enabled(grad), self._autocast(weight.dtype == torch.float32):
            output = tower(pixels, output_hidden_states=True)
            layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
            return select(output.hidden_states, layer, strategy)

    def embed(self, input_ids: Tensor, images: BatchImages | None) -> Tensor:
        """Input embeddings ``[1, N, H]`` of ``[1, N]`` token ids."""
        embedding = self.llava.get_input_embeddings()
        if images is None:
            return embedding(input_ids) + self._nothing()  # type: ignore[no-any-return]
        vectors: Tensor = embedding(input_ids.masked_fill(images.mask, 0))
        projected = self._projected(self._all_features(images))
        wanted, found = int(images.mask.sum()), projected.shape[0] * projected.shape[1]
        if wanted != found:
            raise ModelError(f"{wanted} image tokens for {found} features of images")
        return vectors.masked_scatter(images.mask[..., None], projected.to(vectors.dtype))

    def _nothing(self) -> Tensor:
        """A zero that is computed through the vision tower and the projector."""
        size = self.llava.config.vision_config.image_size
        projected = self._projected(self.features(torch.zeros(1, 3, size, size)))
        dtype = self.llava.get_input_embeddings().weight.dtype
        return (projected[0, 0] * 0.0).to(dtype)  # type: ignore[no-any-return]

    def weights(self) -> Iterator[nn.Parameter]:
        """The weights that only images use: vision tower and projector."""
        yield from self.llava.model.vision_tower.parameters()
        yield from self.llava.model.multi_modal_projector.parameters()

    def positions(self, batch: Batch) -> Tensor:
        """Position ids ``[1, N]``; image tokens count like text tokens."""
        return batch.position_ids

    def train(self, mode: bool = True) -> LlavaEmbedder:
        """Set training mode; a frozen vision tower stays in evaluation mode."""
        super().train(mode)
        if not self.train_encoder and (tower := self.llava.model.vision_tower) is not None:
            tower.eval()
        return self

    def _all_features(self, images: BatchImages) -> Tensor:
        fresh: Any = self.features(images.pixel_values) if images.pixel_values else None
        self._keep(images, fresh)
        if all(kept is None for kept in images.features):
            return fresh  # type: ignore[no-any-return]
        queue = iter(() if fresh is None else fresh)
        found = [next(queue) if kept is None else kept for kept in images.features]
        device = self.llava.get_input_embeddings().weight.device
        return torch.stack([f.to(device, found[0].dtype) for f in found])

    def _keep(self, images: BatchImages, fresh: Tensor | None) -> None:
        if self.keep is None or fresh is None or not images.keys:
            return
        missing = [k for k, f in zip(images.keys, images.features, strict=True) if f is None]
        for key, features in zip(missing, fresh, strict=True):
            self.keep(key, features)

    def _autocast(self, wanted: bool = True) -> torch.autocast:
        enabled = wanted and self.autocast is not None
        device = self.llava.get_input_embeddings().weight.device.type
        return torch.autocast(device, dtype=self.autocast, enabled=enabled)

    def _projected(self, features: Tensor) -> Tensor:
        projector = self.llava.model.multi_modal_projector
        if self.autocast is None:
            features = features.to(projector.linear_1.weight.dtype)
        with self._autocast():
            return projector(features)  # type: ignore[no-any-return]
