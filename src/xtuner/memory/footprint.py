"""The memory of a training step, measured without loading weights. The model is built from its
configuration on the meta device, prepared by the same code as a real one (`models.prepare`), and
runs one step (`memory.step`). So the peak is that of this architecture with these settings, not an
average from a formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xtuner.config.schema import Settings
from xtuner.engine.strategies import units_of
from xtuner.kernels import host_embedding
from xtuner.kernels.compiled import kernels_for
from xtuner.memory.experts import use_footprint
from xtuner.memory.step import KEPT_BY_FLASH, line, peaks_of_step
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.load import located_config, meta_model
from xtuner.models.prepare import llm_autocast, make_trainable
from xtuner.parallel.ulysses import PretendedGroup

BYTES_QUANTISED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}
FEW_LAYERS = (2, 4)
"""Every layer adds the same amount, so two shallow models suffice to extrapolate: 1 s instead of 7
s."""


@dataclass(frozen=True)
class Footprint:
    """Bytes and counts of one model under one choice of settings.

    Attributes:
        weights: Bytes of all weights as stored, including adapters.
        step: Peak of everything else within a step except optimizer state: activations, gradients,
            logits, scratch.
        gradients: Bytes of all gradients; part of `step`.
        trainable: Number of trained parameters.
        parameters: Number of all parameters.
        width: Width of the hidden states.
        embedding: Bytes of the input embedding, part of `weights`, if it can stay on the CPU.
        unit: Bytes of the largest unit of weights that is gathered at once if weights are sharded:
            a layer, the embedding or the output head.
        shared: Bytes of weights that several modules share, such as tied embeddings. They are in no
            unit, and are gathered for the whole pass if weights are sharded.
    """

    weights: int
    step: int
    gradients: int
    trainable: int
    parameters: int
    width: int = 0
    embedding: int = 0
    unit: int = 0
    shared: int = 0


def measure(
    settings: Settings,
    *,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    device: str = "cpu",
    recompute: bool = False,
) -> Footprint:
    """Run one step of the language model of `settings` without its weights.

    Args:
        settings: The run's settings; only the model's config.json is read.
        tokens: Lengths of the samples in one micro-batch; all tokens count as supervised.
        dtype: The dtype of the computation and of frozen weights.
        device: 'cpu' or 'cuda'.
        recompute: Recompute activations in the backward pass.

    Raises:
        ModelError: The configuration cannot be read.
    """
    config = located_config(
        settings.pretrained_model_name_or_path, trust_remote_code=settings.trust_remote_code
    )
    text = config.get_text_config()
    # Other attention needs a mask, which transformers creates from the values of positions.
    settings = settings.model_copy(update={"attn_implementation": "auto"})
    measured = _Measured(settings, config, tokens, dtype, device, recompute)
    layers = getattr(text, "num_hidden_layers", 0)
    if layers <= max(FEW_LAYERS) or _layers_differ(text):
        values = measured.counts(None)
    else:
        few, more = (measured.counts(count) for count in FEW_LAYERS)
        values = [line(FEW_LAYERS, pair, at=layers) for pair in zip(few, more, strict=True)]
    weights, gradients, trainable, parameters, *others = map(round, values)
    embedding, unit, shared, *peaks = others
    return Footprint(
        weights,
        max(peaks),
        gradients,
        trainable,
        parameters,
        width=text.hidden_size,
        embedding=embedding,
        unit=unit,
        shared=shared,
    )


@dataclass(frozen=True)
class _Measured:
    """One measurement; the fields are the arguments of `measure` and the model's configuration."""

    settings: Settings
    config: Any
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: str
    recompute: bool

    def counts(self, num_layers: int | None) -> list[float]:
        """Weights, gradients, trainable, parameters, embedding, unit, shared and peaks of the model
        with `num_layers`, None for all."""
        s, on_gpu = self.settings, self.device == "cuda"
        saved = scratch = embedding = 0.0

        def base(stored: torch.dtype) -> Any:
            nonlocal saved, scratch, embedding
            model = meta_model(
                self.config,
                dtype=stored,
                num_layers=num_layers,
                trust_remote_code=s.trust_remote_code,
            )
            _fix_rotation(model)
            use_footprint(model)
            model.config.pad_token_id = (
                None  # GPT-2 searches for it in the ids, which have no values
            )
            saved, scratch = _quantised_size(s, model)
            if self._reads_four_bits(model):
                scratch = 0
            if s.uses_adapter:
                named = (*s.lora_target_modules, *s.lora_modules_to_save)
                embedding = host_embedding.bytes_to_leave(model, named)
            return model

        model = make_trainable(
            s, dtype=self.dtype, device=self.device, recompute=self.recompute, base=base
        )
        wrapped = PackedCausalLM(model, autocast=llm_autocast(s, self.dtype))
        if s.sequence_parallel_size > 1 and not wrapped.apart:
            wrapped.assume_split(PretendedGroup(s.sequence_parallel_size))
        if on_gpu and not wrapped.apart:
            wrapped.causal.set_attn_implementation(KEPT_BY_FLASH)
        if s.has_vision and not self.recompute:  # as the projector's output does
            wrapped.causal.enable_input_require_grads()
        trainable, parameters = adapters.count_parameters(model)
        held = [(p.nbytes, p.requires_grad) for p in model.parameters()]
        gradients = sum(size for size, trained in held if trained)
        units = units_of(wrapped)
        unit = max(_bytes_of(each) for each in units)
        inside = {id(p) for each in units for p in each.parameters()}
        shared = sum(p.nbytes for p in wrapped.parameters() if id(p) not in inside)
        accumulate = s.keeps_gradients(self.device)
        peaks = peaks_of_step(
            wrapped.train(),
            self.tokens,
            self._few(wrapped.causal),
            on_gpu=on_gpu,
            accumulate=accumulate,
        )
        beside = scratch + accumulate * gradients
        weights = sum(size for size, _ in held) - saved
        counts = [weights, gradients, trainable, parameters, embedding, unit, shared]
        return [*counts, *(peak + beside for peak in peaks)]

    def _few(self, model: Any) -> tuple[int, int] | None:
        """Lengths from which longer samples are extrapolated; None for models without recurrent
        state. Without their kernels, models with such a state loop over tokens or chunks in Python:
        2,048 tokens would take minutes even on meta tensors.
        """
        if not getattr(model, "_is_stateful", False):
            return None
        text = self.config.get_text_config()
        chunk = getattr(text, "chunk_size", None) or getattr(text, "mamba_chunk_size", None)
        if not isinstance(chunk, int):
            chunk = 64 if hasattr(text, "linear_key_head_dim") else 8  # hard-coded in these models
        return chunk, 2 * chunk

    def _reads_four_bits(self, model: nn.Module) -> bool:
        """Whether compiled CPU kernels handle all layers without dequantizing them first
        (`kernels.cpu.lora_linear`)."""
        s = self.settings
        four_bits = s.effective_quantization in ("nf4", "fp4") and s.uses_adapter
        if not four_bits or self.recompute or self.device == "cuda" or s.lora_dropout:
            return False
        kernels = kernels_for(torch.empty(0, dtype=self.dtype))
        if kernels is None or not kernels.multiplies(s.lora_r):
            return False
        all_linear = list(s.lora_target_modules) == ["all-linear"]
        return all_linear and all(layer.in_features % 64 == 0 for layer in _quantised_layers(model))


def _bytes_of(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _layers_differ(text: Any) -> bool:
    kinds = set(getattr(text, "layer_types", None) or ())
    return len(kinds) > 1 or bool(getattr(text, "first_k_dense_replace", 0))


def _fix_rotation(model: nn.Module) -> None:
    """Make rotary frequencies independent of the longest sample. For types such as 'dynamic',
    transformers' `dynamic_rope_update` reads the positions, which have no values here. Frequencies
    take the same memory whatever their values.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):  # one for each layer type
            module.rope_type = dict.fromkeys(kind, "default")  # type: ignore[assignment]


def _quantised_size(s: Settings, model: nn.Module) -> tuple[float, int]:
    """The bytes that quantization saves, and those of the largest dequantized weight."""
    quantization = s.effective_quantization
    if quantization == "none":
        return 0, 0
    scales = (1 / 64 + 4 / (64 * 256)) if s.double_quant else 4 / 64
    each = BYTES_QUANTISED[quantization] + (0 if quantization == "int8" else scales)
    sizes = [(m.weight.numel(), m.weight.element_size()) for m in _quantised_layers(model)]
    saved = sum(count * (size - each) for count, size in sizes)
    return saved, max((count * size for count, size in sizes), default=0)


def _quantised_layers(model: nn.Module) -> list[nn.Linear]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
