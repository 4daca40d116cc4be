"""Builds the trainable language model from the settings of a run.

    base model ──attention, fused layers──► recomputation ──► adapters, all weights, or frozen

The base model is loaded with its weights, or built on the meta device for a memory forecast; the
preparation is the same.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xtuner.config.marks import thawed
from xtuner.config.schema import Settings
from xtuner.kernels import host_embedding
from xtuner.kernels.fused import attention, decoder, norm_mlp
from xtuner.models import adapters, vocabulary
from xtuner.models.can_pack import training_implementation
from xtuner.models.load import lasting_name, load_model
from xtuner.models.text_path import freeze_outside_text
from xtuner.models.vision.folder import LLM, LLM_ADAPTER


def make_trainable(
    s: Settings,
    *,
    dtype: torch.dtype,
    device: str,
    recompute: bool,
    embedding_on_cpu: bool = False,
    source: Path | None = None,
    base: Callable[[torch.dtype], Any] | None = None,
) -> Any:
    """Load the language model of a run and prepare it for training.

    Args:
        dtype: The dtype of the computation and of frozen weights.
        device: The model's device; for a meta model, the device it would have.
        recompute: Recompute activations in the backward pass instead of keeping them.
        embedding_on_cpu: Keep the input embedding in CPU memory.
        source: The checkpoint to load trained weights from.
        base: Creates the base model with weights of the given dtype; None loads it. Layers of a
            meta model are replaced without comparing their results.

    Raises:
        ModelError: The model cannot be loaded, `source` does not fit it, or its embedding cannot
            stay on the CPU.
    """
    stored = weights_dtype(s, dtype)
    model = base(stored) if base else _loaded(s, stored, device, source)
    on_meta = next(model.parameters()).is_meta
    new_rows = grow(model, s)
    model.set_attn_implementation(training_implementation(model, s.attn_implementation))
    if embedding_on_cpu:
        host_embedding.install(model, [*s.lora_target_modules, *s.lora_modules_to_save])
    norm_mlp.install(model, check=not on_meta)
    # On a GPU these need Liger, which is only compared with the layers on real values.
    if not (on_meta and device == "cuda"):
        attention.install(model, check=not on_meta)
        decoder.install(model, check=not on_meta)
    if s.llm_training == "frozen":
        model.requires_grad_(False)
    elif s.llm_training == "full":
        freeze_outside_text(model)
    if recompute:
        _recompute(model, s)
    if not s.uses_adapter:
        return model
    adapted = _add_adapters(model, s, new_rows)
    if source is not None:
        adapters.load_adapter_weights(adapted, source / LLM_ADAPTER if s.has_vision else source)
    return adapted


def _add_adapters(model: Any, s: Settings, new_rows: range) -> Any:
    """Freeze `model` and add the adapters of a run."""
    on_meta = next(model.parameters()).is_meta
    adapted = adapters.add_adapter(
        model,
        r=s.lora_r,
        alpha=s.effective_lora_alpha,
        dropout=s.lora_dropout,
        target_modules=s.lora_target_modules,
        modules_to_save=s.lora_modules_to_save,
        seed=s.seed,
        further={**_further(s, on_meta=on_meta), **_trained_rows(model, s, new_rows)},
    )
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = lasting_name(s.pretrained_model_name_or_path)
    return adapted


def try_adapters(model: Any, s: Settings) -> None:
    """Add the adapters of a run to a copy of `model`, which is on the meta device.

    Raises:
        XTunerError: PEFT refuses a setting, or the model's embeddings cannot grow.
    """
    model = copy.deepcopy(model)
    with warnings.catch_warnings():  # the run shows them
        warnings.simplefilter("ignore")
        _add_adapters(model, s, grow(model, s))


def _recompute(model: Any, s: Settings) -> None:
    kept = s.lora_dropout > 0 or draws_random_numbers(model)
    options = {"use_reentrant": False, "preserve_rng_state": kept}
    model.activation_checkpointing_enable(options)
    model.enable_input_require_grads()


def draws_random_numbers(model: Any) -> bool:
    """Whether `model` uses dropout in training. If not, recomputation need not restore the random
    state, which would synchronize with the GPU and cannot be recorded in a graph."""
    rates = [model.config.to_dict(), *(vars(module) for module in model.modules())]
    named = any("drop" in k and isinstance(v, float) and v > 0 for r in rates for k, v in r.items())
    return named or any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())


def _further(s: Settings, *, on_meta: bool) -> dict[str, Any]:
    """The setting `lora_config`, adapted for meta tensors, which have no principal components."""
    further: dict[str, Any] = thawed(s.lora_config) or {}
    return {k: v for k, v in further.items() if not (on_meta and k == "init_lora_weights")}


def grow(model: Any, s: Settings) -> range:
    """The new embeddings of `model`, with the setting `resize_embeddings`."""
    if not s.resize_embeddings:
        return range(0)
    return vocabulary.grow_to_tokenizer(
        model, s.pretrained_model_name_or_path, trust_remote_code=s.trust_remote_code
    )


def _trained_rows(model: Any, s: Settings, rows: range) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig that train `rows` of the embeddings."""
    if not rows:
        return {}
    vocabulary.check_targets(model, s.lora_target_modules)
    indices = vocabulary.trainable_rows(model, rows, saved=s.lora_modules_to_save)
    given = (thawed(s.lora_config) or {}).get("trainable_token_indices") or {}
    if not isinstance(given, dict):
        given = {next(iter(indices), "embed_tokens"): given}
    for name, more in given.items():
        key = next((key for key in indices if key.endswith(name)), name)
        indices[key] = sorted({*indices.get(key, ()), *more})
    return {"trainable_token_indices": indices} if indices else {}


def weights_dtype(s: Settings, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a run that computes in `dtype` stores the language model's weights."""
    return torch.float32 if s.llm_training == "full" else dtype


def llm_autocast(s: Settings, dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to autocast the language model to; None if it computes in its weights' dtype."""
    in_float32 = s.llm_training == "full" or bool(s.lora_modules_to_save)
    return autocast_dtype(dtype) if in_float32 else None


def autocast_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype to autocast modules with float32 weights to, in a run that computes in `dtype`."""
    return None if dtype == torch.float32 else dtype


def _loaded(s: Settings, dtype: torch.dtype, device: str, source: Path | None) -> Any:
    path: str | Path = s.pretrained_model_name_or_path
    if s.llm_training == "full" and source is not None:
        path = source / LLM if s.has_vision else source
    return load_model(
        path,
        dtype=dtype,
        device=device,
        quantization=s.effective_quantization,
        double_quant=s.double_quant,
        trust_remote_code=s.trust_remote_code,
    )
