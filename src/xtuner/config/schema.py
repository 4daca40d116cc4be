"""All settings of a run, checked and frozen, and values derived from them.

`Settings` is flat. Its bases are the parts of a settings file, in order (`config.parts`). pydantic
checks each value alone, `config.combinations` checks combinations, and all problems are reported
together.
"""

from __future__ import annotations

import math
from typing import Literal

from xtuner.config.marks import Mark, OnResume, mark_of
from xtuner.config.parts import (
    DataPart,
    EvaluationPart,
    ModelPart,
    OptimPart,
    Part,
    RuntimePart,
    VisionPart,
)


class Settings(ModelPart, VisionPart, DataPart, OptimPart, EvaluationPart, RuntimePart):
    """All settings of one run, checked and frozen."""

    @property
    def uses_adapter(self) -> bool:
        """Whether adapters are trained, rather than all weights."""
        return self.tuning != "full"

    @property
    def has_vision(self) -> bool:
        """Whether the model takes images."""
        return self.visual_encoder_name_or_path is not None

    @property
    def llm_training(self) -> Literal["frozen", "adapter", "full"]:
        """How the language model is trained."""
        if self.uses_adapter:
            return "adapter"
        return "frozen" if self.has_vision and self.freeze_llm else "full"

    @property
    def visual_encoder_training(self) -> Literal["frozen", "adapter", "full"]:
        """How the vision tower is trained."""
        if self.visual_encoder_lora_r is not None:
            return "adapter"
        return "frozen" if self.freeze_visual_encoder else "full"

    @property
    def effective_quantization(self) -> Literal["none", "nf4", "fp4", "int8"]:
        """`quantization` with 'auto' resolved."""
        if self.quantization == "auto":
            return "nf4" if self.tuning == "qlora" else "none"
        return self.quantization

    @property
    def effective_lora_alpha(self) -> float:
        """`lora_alpha` with 'auto' resolved: the scale of rank-stabilized LoRA."""
        if self.lora_alpha != "auto":
            return self.lora_alpha
        # PEFT then divides by the square root of the rank
        divided = ("use_rslora", True) in self.lora_config
        return 16.0 if divided else 16 * math.sqrt(self.lora_r)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several micro-batches are summed; true until 'auto' is resolved."""
        return self.accumulative_counts == "auto" or self.accumulative_counts > 1

    @property
    def can_keep_embedding_on_cpu(self) -> bool:
        """Whether the settings allow the input embedding to stay in CPU memory."""
        unsharded = self.strategy == "replicated" and not self.resize_embeddings
        return self.uses_adapter and not self.has_vision and unsharded

    @property
    def packs(self) -> bool:
        """Whether samples are packed into rows; true for 'auto' until the model is known."""
        return self.pack_to_max_length is not False

    def keeps_gradients(self, device: str) -> bool:
        """Whether gradients take memory during a forward pass: those of an earlier micro-batch, or
        the memory that a CUDA graph writes to."""
        return self.accumulates or self.may_use_graphs(device)

    def may_use_graphs(self, device: str) -> bool:
        """Whether the decoder may be recorded as CUDA graphs."""
        return device == "cuda" and self.packs and self.cuda_graphs is not False

    @classmethod
    def parts(cls) -> tuple[type[Part], ...]:
        """The parts of a settings file, in order."""
        return tuple(base for base in cls.__mro__ if Part in base.__bases__)

    @classmethod
    def mark(cls, name: str) -> Mark:
        """The mark of setting `name`."""
        return mark_of(list(cls.model_fields[name].metadata))

    @classmethod
    def on_resume(cls, kind: OnResume) -> tuple[str, ...]:
        """Names of the settings that a resume treats as `kind`."""
        return tuple(name for name in cls.model_fields if cls.mark(name).resume == kind)

    @classmethod
    def paths(cls) -> tuple[str, ...]:
        """Names of the settings that name files or folders."""
        return tuple(name for name in cls.model_fields if cls.mark(name).is_path)

    def idle(self) -> list[str]:
        """Names of the settings without effect, given the others."""
        marks = {name: self.mark(name).idle for name in type(self).model_fields}
        return [name for name, rule in marks.items() if rule is not None and rule(self)]

    def without_effect(self) -> list[str]:
        """Names of the explicitly given settings without effect, given the others."""
        return [name for name in self.idle() if name in self.model_fields_set]


ALIASES = {"llm_name_or_path": "pretrained_model_name_or_path"}
"""Alternative names of settings."""


def field_parts(kind: type[Settings] = Settings) -> dict[str, type[Part]]:
    """The part that each setting belongs to, in the order of a settings file."""
    return {name: part for part in kind.parts() for name in part.model_fields}
