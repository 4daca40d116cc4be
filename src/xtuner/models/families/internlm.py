"""InternLM 1, natively: Llama whose attention has biases, with Llama's own tensor names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MODEL_TYPES = ("internlm",)


class InternLMConfig(LlamaConfig):
    """Llama's configuration, read from and written with InternLM's name `bias`."""

    model_type = "internlm"
    attention_bias: bool = True

    def __post_init__(self, bias: bool | None = None, **kwargs: Any) -> None:
        """Take `bias` for `attention_bias`; the rest is Llama's."""
        if bias is not None:
            self.attention_bias = bias
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as other software reads InternLM's config.json."""
        values: dict[str, Any] = super().to_dict()
        values["bias"] = values.pop("attention_bias")
        return values


class InternLMForCausalLM(LlamaForCausalLM):
    """Llama under the name that InternLM's checkpoints carry."""

    config_class = InternLMConfig
    config: InternLMConfig


def register() -> None:
    """Teach transformers' Auto classes InternLM. May be called again."""
    AutoConfig.register("internlm", InternLMConfig, exist_ok=True)
    AutoModelForCausalLM.register(InternLMConfig, InternLMForCausalLM, exist_ok=True)
