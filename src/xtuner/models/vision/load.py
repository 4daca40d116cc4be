"""Loads a LLaVA model for inference, from its parts or from the folder of a complete model.

language model + llm_adapter/ ─┐
vision tower + ..._adapter/ ───┼─assemble─► LlavaForConditionalGeneration + image processor
projector/ ────────────────────┘
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.errors import ConfigError, ModelError, shell_command
from xtuner.kernels.four_bit import fix_4bit_layers
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, quiet_transformers, readable_errors
from xtuner.models.old_adapters import fitting_encoder_adapter
from xtuner.models.quantize import Quantization, Rounding, quantization_config
from xtuner.models.run_info import RunInfo
from xtuner.models.vision import folder as layout
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.llava import LlavaEmbedder, assemble
from xtuner.models.vision.tower import add_image_token, load_vision_tower, num_image_tokens
from xtuner.types import ImageEmbedder, ImageProcessor

logger = logging.getLogger("xtuner.chat")


@dataclass(frozen=True)
class VisionLanguageModel:
    """A model with image input.

    Attributes:
        model: A transformers model, such as a `LlavaForConditionalGeneration`.
        embedder: Computes its input embeddings.
        processor: Preprocesses its images.
        image_token_id: The id of the token ``<image>``.
    """

    model: Any
    embedder: ImageEmbedder
    processor: ImageProcessor
    image_token_id: int


@dataclass(frozen=True)
class Sources:
    """Where the parts of a LLaVA model are.

    Attributes:
        llm: The language model that the run started from.
        parts: The folder of the trained parts.
        visual_encoder: The encoder that the run started from; empty if the parts contain their own.
        select_layer: The encoder layer whose output is used.
        pad_to_square: Whether images are padded to a square.
        llm_adapter: The folder of the language model's adapter, if there is one.
    """

    llm: str
    parts: Path
    visual_encoder: str = ""
    select_layer: int = -2
    pad_to_square: bool = True
    llm_adapter: Path | None = None

    @classmethod
    def of(cls, parts: Path, *, llm: str = "", visual_encoder: str = "") -> Sources:
        """The sources that the folder `parts` names.

        Args:
            llm: Replaces the language model that `parts` names; if `parts` contains a trained one,
                that is used instead, with a warning.
            visual_encoder: Replaces the encoder that `parts` names.

        Raises:
            ModelError: One of the two is unknown.
            ConfigError: `visual_encoder` is given, but `parts` contains a trained one.
        """
        info = RunInfo.read(parts)
        settings = dict(info.settings) if info else {}
        own_llm = parts / layout.LLM
        own_llm = parts if not own_llm.is_dir() and (parts / "config.json").is_file() else own_llm
        if own_llm.is_dir():
            if llm and Path(llm).expanduser().resolve() not in (own_llm.resolve(), parts.resolve()):
                logger.warning(
                    "%s is the trained language model and replaces %s",
                    own_llm, llm,
                )  # fmt: skip
            llm = str(own_llm)
        own_encoder = parts / layout.ENCODER
        if own_encoder.is_dir():
            if visual_encoder and Path(visual_encoder).resolve() != own_encoder.resolve():
                raise ConfigError(
                    f"--visual-encoder {visual_encoder}: {parts} contains the encoder that was "
                    f"trained with the projector ({layout.ENCODER}/); remove --visual-encoder"
                )
            visual_encoder = str(own_encoder)
        llm = llm or (info.base_model if info else "")
        encoder = visual_encoder or (info.visual_encoder if info else "")
        if not llm or not encoder:
            lacks = "--visual-encoder" if llm else "the language model"
            raise ModelError(
                f"{parts}: does not say which language model and vision tower it was trained "
                f"with ({lacks} is missing); give them: "
                + shell_command(
                    "xtuner", "chat", "LLM", "--visual-encoder", "CLIP", "--llava", parts
                )
            )
        adapter = parts / layout.LLM_ADAPTER
        return cls(
            llm,
            parts,
            encoder,
            int(settings.get("visual_select_layer", -2)),
            bool(settings.get("pad_image_to_square", True)),
            adapter if adapter.is_dir() else None,
        )


def load_llava(
    sources: Sources,
    tokenizer: Any,
    *,
    dtype: torch.dtype,
    device: str,
    quantization: Quantization = "none",
    rounding: Rounding | None = None,
    trust_remote_code: bool = False,
    merged: bool = False,
) -> VisionLanguageModel:
    """Load the parts and assemble the model.

    Args:
        sources: Where the parts are.
        tokenizer: Gets the token ``<image>``.
        dtype: The dtype of weights and computation.
        device: 'cpu' or 'cuda'.
        quantization: How the language model is quantized.
        rounding: Round the language model's weights as a run with 4-bit weights did.
        trust_remote_code: Run Python code that is stored with the language model.
        merged: Merge the adapters into the weights.

    Raises:
        ModelError: A part is missing or does not fit the others.
    """
    folder = sources.parts
    llm: Any = load_model(
        sources.llm, dtype=dtype, device=device, quantization=quantization,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if rounding:
        rounding.apply(llm)
    if sources.llm_adapter is not None:
        llm = _base_of(load_adapter(llm, sources.llm_adapter), merged)
    encoder: Any = load_vision_tower(sources.visual_encoder, dtype=dtype, device=device)
    if (folder / layout.ENCODER_ADAPTER).is_dir():
        with fitting_encoder_adapter(folder / layout.ENCODER_ADAPTER) as path:
            encoder = _base_of(load_adapter(encoder, path), merged)
    token_id = add_image_token(tokenizer)
    model = assemble(llm, encoder, image_token_id=token_id, select_layer=sources.select_layer)
    layout.load_projector(model, folder)
    model.model.multi_modal_projector.to(dtype)
    processor = LlavaImageProcessor.of_tower(
        sources.visual_encoder, pad_to_square=sources.pad_to_square
    )
    return VisionLanguageModel(model.eval(), LlavaEmbedder(model), processor, token_id)


def load_complete(
    folder: Path, *, dtype: torch.dtype, device: str, quantization: Quantization = "none"
) -> VisionLanguageModel:
    """Load the folder of a complete `LlavaForConditionalGeneration`.

    Args:
        dtype: The dtype of weights and computation.
        device: 'cpu' or 'cuda'.
        quantization: How the language model is quantized.

    Raises:
        ModelError: It cannot be read.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    options: dict[str, Any] = {}
    if quantization != "none":
        how = quantization_config(quantization, double_quant=True, compute_dtype=dtype)
        how.llm_int8_skip_modules = [
            "model.vision_tower", "model.multi_modal_projector", "lm_head"
        ]  # fmt: skip
        options = {"quantization_config": how, "device_map": {"": device}}
    with readable_errors(folder, "LLaVA model"), quiet_transformers():
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options)
        upstream = LlavaImageProcessorPil.from_pretrained(folder)
    fix_4bit_layers(model)
    model = model if options else model.to(device)
    processor = LlavaImageProcessor(upstream, num_image_tokens(model.config.vision_config))
    return VisionLanguageModel(
        model.eval(), LlavaEmbedder(model), processor, model.config.image_token_index
    )


def _base_of(adapted: Any, merged: bool) -> Any:
    return adapted.merge_and_unload() if merged else adapted.get_base_model()
