"""Facts about a model from its configuration and shapes, before its weights are read."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM

from xtuner.config.schema import Settings
from xtuner.errors import ModelError
from xtuner.models.load import cache_key, located_config, meta_model, readable_errors

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")

_NAMED_POSITIONS = re.compile(r"(position\w*|pos_emb\w*|wpe)$")


@dataclass(frozen=True)
class ModelFacts:
    """A model without weights.

    Attributes:
        path: The setting.
        config: The transformers configuration.
        model: The causal language model on the meta device.
    """

    path: str
    config: Any
    model: Any

    @property
    def vocab_size(self) -> int:
        """Number of rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def positions(self) -> int | None:
        """The model's maximum sequence length; None if its configuration does not state it."""
        text = self.config.get_text_config()
        found = (getattr(text, name, None) for name in _POSITIONS)
        return next((value for value in found if isinstance(value, int) and value > 0), None)

    @property
    def learned_positions(self) -> bool:
        """Whether positions have learned embeddings, so that longer texts are impossible."""
        words, limit = self.model.get_input_embeddings(), self.positions or 0
        return any(
            isinstance(module, nn.Embedding)
            and module is not words
            and _NAMED_POSITIONS.search(name)
            and 0 <= module.num_embeddings - limit <= 2  # OPT starts at 2
            for name, module in self.model.named_modules()
        )

    @property
    def stored_quantization(self) -> str:
        """How the checkpoint's weights are quantized, in words; empty if they are not."""
        stored = getattr(self.config, "quantization_config", None)
        if stored is None:
            return ""
        values = stored if isinstance(stored, dict) else stored.to_dict()
        method = str(values.get("quant_method") or "unknown")
        bits = values.get("bits") or (
            4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else None
        )
        return f"{bits} bits ({method})" if bits else method


def facts_of(settings: Settings) -> ModelFacts:
    """The facts of the run's model.

    Raises:
        ModelError: The model does not exist, its configuration cannot be read, or it is not a
            causal language model.
    """
    path = settings.pretrained_model_name_or_path
    return _facts(path, settings.trust_remote_code, cache_key(path))


@functools.lru_cache(maxsize=4)
def _facts(path: str, trust_remote_code: bool, _key: tuple[str, int, int]) -> ModelFacts:
    config = located_config(path, trust_remote_code=trust_remote_code)
    check_kind(path, config)
    with readable_errors(path, "model"):
        model = meta_model(config, trust_remote_code=trust_remote_code)
    return ModelFacts(path, config, model)


def check_kind(path: str, config: Any) -> None:
    """Refuse models that are not causal language models.

    Raises:
        ModelError: Says what the model is and what to do.
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    if type(config) in AutoModelForCausalLM._model_mapping:
        return
    name = f"{path} ({config.model_type})"
    if getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model, which reads a text and writes another"
        hint = "Give a decoder-only model, such as Qwen3 or Llama"
    elif hasattr(config, "vision_config") or hasattr(config, "vision_tower"):
        kind = "a vision-language model"
        hint = (
            "Its vision part cannot be trained here. Give a language model; for images, train "
            "LLaVA on it: `xtuner list-cfg -p llava`"
        )
    elif hasattr(config, "audio_config"):
        kind, hint = "a speech or audio model", "Give a language model"
    else:
        kind, hint = "not a causal language model that transformers knows", "Give another model"
    raise ModelError(f"pretrained_model_name_or_path: {name} is {kind}. {hint}")
