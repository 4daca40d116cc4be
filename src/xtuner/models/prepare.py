"""The language model of a run, with what is trained in it made trainable and made fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xtuner.config.schema import Settings
from xtuner.kernels import host_embedding
from xtuner.kernels.fused import attention, decoder, norm_mlp
from xtuner.models import adapters
from xtuner.models.can_pack import training_implementation
from xtuner.models.load import load_model
from xtuner.models.vision.parts import LLM, LLM_ADAPTER


def make_trainable(
    s: Settings,
    *,
    dtype: torch.dtype,
    device: str,
    recompute: bool,
    embedding_on_cpu: bool = False,
    source: Path | None = None,
) -> Any:
    """Load the language model, put our layers into it, and add its adapters.

    Args:
        s: settings of the run.
        dtype: of the computation and of frozen weights.
        device: where the model goes.
        recompute: compute activations again in the backward pass instead of keeping them.
        embedding_on_cpu: leave the input embedding in the CPU's memory.
        source: a checkpoint whose trained weights are taken.

    Raises:
        ModelError: the model cannot be loaded, or `source` does not fit it, or its embedding cannot
            be apart from the rest.
    """
    full = s.llm_training == "full"
    place: str | Path = s.pretrained_model_name_or_path
    if full and source is not None:
        place = source / LLM if s.has_vision else source
    base = load_model(
        place,
        dtype=torch.float32 if full else dtype,
        device=device,
        quantization=s.effective_quantization,
        double_quant=s.double_quant,
        trust_remote_code=s.trust_remote_code,
    )
    base.set_attn_implementation(training_implementation(base, s.attn_implementation))
    if embedding_on_cpu:
        host_embedding.install(base, [*s.lora_target_modules, *s.lora_modules_to_save])
    norm_mlp.install(base)
    attention.install(base)
    decoder.install(base)
    if recompute:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if not s.uses_adapter:
        return base
    adapted = adapters.add_adapter(
        base,
        r=s.lora_r,
        alpha=s.lora_alpha,
        dropout=s.lora_dropout,
        target_modules=s.lora_target_modules,
        modules_to_save=s.lora_modules_to_save,
        seed=s.seed,
    )
    if source is not None:
        adapters.load_adapter_weights(adapted, source / LLM_ADAPTER if s.has_vision else source)
    return adapted
