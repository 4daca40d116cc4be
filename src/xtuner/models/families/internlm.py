"""InternLM 1: Llama with biases in attention and the same tensor names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MODEL_TYPES = ("internlm",)


class InternLMConfig(LlamaConfig):
    """Llama's configuration with InternLM's name `bias` for `attention_bias`."""

    model_type = "internlm"
    attention_bias: bool = True

    def __post_init__(self, bias: bool | None = None, **kwargs: Any) -> None:
        """Map `bias` to `attention_bias`."""
        if bias is not None:
            self.attention_bias = bias
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration in the format of InternLM's config.json."""
        values: dict[str, Any] = super().to_dict()
        values["bias"] = values.pop("attention_bias")
        return values


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama under the class name in InternLM's checkpoints."""

    config_class = InternLMConfig
    config: InternLMConfig


def register() -> None:
    """Register InternLM with transformers' Auto classes; idempotent."""
    AutoConfig.register("internlm", InternLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(InternLMConfig, InternLMForCausalLM, exist_ok=True)
