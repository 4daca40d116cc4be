"""How much memory a training step takes, found without a weight being loaded.

The model is built from its configuration with tensors that have shapes but no values, and one real
step goes through it: our attention, our loss, recomputation, adapters, backward pass. Every tensor
that comes alive and dies is counted, so the peak is that of this architecture with these settings,
not of a formula for the average one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from xtuner.kernels import cross_entropy, host_embedding
from xtuner.kernels.attention import blocks, packed
from xtuner.kernels.compiled import kernels_for, shapes_only
from xtuner.kernels.fused import attention as fused_attention
from xtuner.kernels.fused import decoder, norm_mlp
from xtuner.kernels.scratch import buffers
from xtuner.memory.live_bytes import LiveBytes, pretend_cpu
from xtuner.models import adapters
from xtuner.models.can_pack import training_implementation, why_apart
from xtuner.models.causal_lm import missing_to_round
from xtuner.models.load import located_config, quiet_transformers
from xtuner.models.quantize import Quantization

KEPT_BY_FLASH = "xtuner_footprint"
BYTES_QUANTISED = {"nf4": 0.5, "fp4": 0.5, "int8": 1.0}


@dataclass(frozen=True)
class Footprint:
    """Bytes and counts of one model under one choice of settings.

    Attributes:
        weights: as they are held, adapters included.
        step: highest sum of everything else alive within a step but the optimizer's state:
            activations, gradients, logits, workspace.
        gradients: of all trained weights; part of `step`.
        trainable: trained numbers.
        parameters: all numbers.
        width: of the hidden states.
        embedding: bytes of the input embedding, part of `weights`, if it may stay on the CPU.
    """

    weights: int
    step: int
    gradients: int
    trainable: int
    parameters: int
    width: int = 0
    embedding: int = 0


def measure(
    path: str,
    *,
    tokens: tuple[int, ...],
    dtype: torch.dtype,
    quantization: Quantization = "none",
    double_quant: bool = True,
    lora: dict[str, Any] | None = None,
    frozen: bool = False,
    sees: bool = False,
    recompute: bool = False,
    accumulate: bool = False,
    flash: bool = False,
    autocast: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Footprint:
    """Send one step of the lengths `tokens` through the model at `path`, without its weights.

    Args:
        path: a folder, a hub name, or a name that was fetched; only its config.json is read.
        tokens: lengths of the samples of one micro-batch; all are taken as supervised.
        dtype: of the frozen weights, or of all in full fine-tuning.
        quantization: how frozen linear layers are held.
        double_quant: whether their scales are quantised as well.
        lora: arguments of `adapters.add_adapter`; None trains all weights, unless they are
            `frozen`.
        frozen: train nothing of it.
        sees: the input embeddings get gradients, as those of a projector before it do.
        recompute: recompute activations in the backward pass.
        accumulate: gradients of an earlier micro-batch are there already.
        flash: attention keeps what flash attention on a GPU keeps, not what a CPU keeps.
        autocast: type of the products when it is not that of the weights.
        trust_remote_code: run Python code that lies beside the configuration.

    Raises:
        ModelError: the configuration cannot be had.
    """
    config = located_config(path, trust_remote_code=trust_remote_code)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)

    def some(count: int | None) -> _Counts:
        model = _build(config, count, dtype, trust_remote_code)
        apart = why_apart(model) is not None
        implementation = training_implementation(model, "auto")
        if flash and implementation == packed.NAME:
            implementation = KEPT_BY_FLASH
        model.set_attn_implementation(implementation)
        _fix_rotation(model)
        rows = [(n,) for n in tokens] if apart else [tokens]
        few = _few_tokens(config) if getattr(model, "_is_stateful", False) else None
        norm_mlp.install(model, check=False)
        if not flash:
            fused_attention.install(model, check=False)
            decoder.install(model, check=False)
        saved, scratch_buffer = _quantised_size(model, quantization, double_quant)
        embedding = 0
        if lora is not None:
            named = (*lora.get("target_modules", ()), *lora.get("modules_to_save", ()))
            embedding = host_embedding.bytes_to_leave(model, named)
        in_four_bits = quantization in ("nf4", "fp4") and not (recompute or flash)
        if in_four_bits and lora and _reads_four_bits(model, lora, autocast or dtype):
            scratch_buffer = 0
        if frozen:
            model.requires_grad_(False)
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if recompute or sees:
            model.enable_input_require_grads()
        if lora is not None:
            model = adapters.add_adapter(model, **lora)
        trainable, parameters = adapters.count_parameters(model)
        held = [(p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
        with nullcontext() if flash else shapes_only():
            peaks = _peaks_of_rows(
                model.train(), rows, few, autocast=autocast, on_gpu=flash, accumulate=accumulate
            )
        weights = sum(size for size, _ in held) - saved
        gradients = sum(size for size, trained in held if trained)
        beside = scratch_buffer + accumulate * gradients
        peaks = [peak + beside for peak in peaks]
        return _Counts([weights, gradients, trainable, parameters, embedding, *peaks])

    if layers <= max(FEW_LAYERS) or _layers_differ(config):
        found = some(None)
    else:
        less, more = (some(count) for count in FEW_LAYERS)
        found = less.line_through(more, at=layers)
    weights, gradients, trainable, parameters, embedding, *peaks = map(round, found.values)
    width = config.get_text_config().hidden_size
    return Footprint(weights, max(peaks), gradients, trainable, parameters, width, embedding)


FEW_LAYERS = (2, 4)
"""Every layer adds the same, so a step through so many tells of all: 1 s instead of 7 s."""


@dataclass(frozen=True)
class _Counts:
    values: list[float]

    def line_through(self, other: _Counts, *, at: int) -> _Counts:
        """Values at `at` layers; self has the first, other the second of `FEW_LAYERS`."""
        low, high = FEW_LAYERS
        pairs = zip(self.values, other.values, strict=True)
        return _Counts([_line((low, high), pair, at=at) for pair in pairs])


def _few_tokens(config: Any) -> tuple[int, int]:
    """Lengths of which a line tells about longer samples of a model with a state.

    Without their kernels such models go from token to token, or from chunk to chunk, in Python:
    2,048 tokens would take minutes even on shapes.
    """
    text = config.get_text_config()
    chunk = getattr(text, "chunk_size", None) or getattr(text, "mamba_chunk_size", None)
    if not isinstance(chunk, int):
        chunk = 64 if hasattr(text, "linear_key_head_dim") else 8  # 64 is fixed in their code
    return chunk, 2 * chunk


def _line(xs: tuple[int, int], ys: tuple[float, float], *, at: int) -> float:
    """The value at `at` of the line through two points."""
    return ys[0] + (ys[1] - ys[0]) * (at - xs[0]) / (xs[1] - xs[0])


def _layers_differ(config: Any) -> bool:
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return len(kinds) > 1 or bool(getattr(text, "first_k_dense_replace", 0))


def _build(config: Any, count: int | None, dtype: torch.dtype, trust: bool) -> Any:
    """The model with `count` layers (None: all), on the meta device."""
    config = copy.deepcopy(config)
    if count is not None:
        text = config.get_text_config()
        layers = text.num_hidden_layers
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(text, name, value[:count])
        text.num_hidden_layers = count
    with torch.device("meta"), quiet_transformers():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)


def _fix_rotation(model: nn.Module) -> None:
    """Let no frequencies of rotary embeddings depend on how long the longest sample is.

    transformers' `dynamic_rope_update` reads the positions for types such as 'dynamic', and here
    tensors have no values. Frequencies take the same memory whatever they are.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):  # one for each type of layers
            module.rope_type = dict.fromkeys(kind, "default")  # type: ignore[assignment]


def _quantised_size(
    model: nn.Module, quantization: Quantization, double: bool
) -> tuple[float, int]:
    """What quantisation saves, and the room for the largest weight that is dequantised again."""
    if quantization == "none":
        return 0, 0
    layers = _quantised_layers(model)
    scales = (1 / 64 + 4 / (64 * 256)) if double else 4 / 64
    each = BYTES_QUANTISED[quantization] + (0 if quantization == "int8" else scales)
    sizes = [(m.weight.numel(), m.weight.element_size()) for m in layers]
    saved = sum(count * (size - each) for count, size in sizes)
    return saved, max((count * size for count, size in sizes), default=0)


def _quantised_layers(model: nn.Module) -> list[nn.Linear]:
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _reads_four_bits(model: nn.Module, lora: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether compiled functions of a CPU would take all layers without dequantising them first
    (`cpu_low_rank.reads`)."""
    kernels = kernels_for(torch.empty(0, dtype=dtype))
    if kernels is None or not kernels.multiplies(lora["r"]) or lora.get("dropout"):
        return False
    if list(lora.get("target_modules", ["all-linear"])) != ["all-linear"]:
        return False
    return all(layer.in_features % 64 == 0 for layer in _quantised_layers(model))


def _peaks_of_rows(
    model: Any,
    rows: Sequence[tuple[int, ...]],
    few: tuple[int, int] | None,
    *,
    autocast: torch.dtype | None,
    on_gpu: bool,
    accumulate: bool,
) -> list[float]:
    """As `_peaks_of_step`; with lengths `few`, along the line through steps of these."""
    total = sum(sum(row) for row in rows)
    if few is None or total <= few[1]:
        return [*_peaks_of_step(model, rows, autocast, on_gpu, accumulate)]
    parts = [_peaks_of_step(model, [(n,)], autocast, on_gpu, accumulate) for n in few]
    return [_line(few, pair, at=total) for pair in zip(*parts, strict=True)]


def _peaks_of_step(
    model: Any,
    rows: Sequence[tuple[int, ...]],
    autocast: torch.dtype | None,
    on_gpu: bool,
    accumulate: bool,
) -> list[int]:
    """Peaks of the forward pass with the loss, and of both halves of the backward pass, beside
    gradients that are to be added to. Several rows (of samples' lengths) hold one sample each.

    Each of the three grows by the same with every layer; which is highest may change.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with _caches_apart(), FakeTensorMode(allow_non_fake_inputs=True):
        pretend_cpu(model)
        for parameter in model.parameters():
            given = accumulate and parameter.requires_grad
            parameter.grad = torch.empty_like(parameter) if given else None
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        counter = LiveBytes()
        with counter, torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            if len(rows) == 1 and why_apart(causal) is None:
                value = _loss_of_row(causal, rows[0])
            else:
                value = torch.stack([_loss_alone(causal, count) for (count,) in rows]).sum()
            if on_gpu:  # only on a CPU is it kept
                buffers.tensors.clear()
        forward = len(counter.history)
        with counter:
            value.backward()
        history = counter.history
    middle = (forward + len(history)) // 2
    return [max(history[:forward]), max(history[forward:middle]), max(history[middle:])]


def _loss_of_row(causal: Any, tokens: tuple[int, ...]) -> Tensor:
    """The loss of samples of the lengths `tokens` in one row."""
    supervised = sum(tokens)
    if missing := missing_to_round(supervised):
        tokens = (*tokens, missing)
    ids = torch.zeros(1, sum(tokens), dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *tokens]).cumsum(0).to(torch.int32)
    hidden = causal.base_model(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in tokens])[None],
        use_cache=False,
        cu_seq_lens_q=_Lengths(cu_seqlens, tokens),
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max(tokens),
        max_length_k=max(tokens),
    ).last_hidden_state
    head = causal.get_output_embeddings().weight
    return -cross_entropy.log_probabilities(hidden[0, :supervised], head, ids[0, :supervised]).sum()


def _loss_alone(causal: Any, count: int) -> Tensor:
    """The loss of one sample of `count` tokens by transformers' plainest call."""
    ids = torch.zeros(1, count, dtype=torch.int64)
    hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
    head = causal.get_output_embeddings().weight
    return -cross_entropy.log_probabilities(hidden[0].to(head.dtype), head, ids[0]).sum()


class _Lengths:
    """Borders whose values are known although tensors have none here."""

    def __init__(self, cu_seqlens: Tensor, tokens: tuple[int, ...]):
        self.dtype, self.device, self.shape = cu_seqlens.dtype, cu_seqlens.device, cu_seqlens.shape
        ends = [0]
        for length in tokens:
            ends.append(ends[-1] + length)
        self._ends = ends

    def tolist(self) -> list[int]:
        """The boundaries."""
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)


class _FlashFootprint(torch.autograd.Function):
    """Keeps what flash attention keeps: its inputs, its output, and a float32 a token and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
        sums = query.new_empty(query.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _flash_footprint(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return _FlashFootprint.apply(q, k, v)[None], None  # type: ignore[no-untyped-call]


AttentionInterface.register(KEPT_BY_FLASH, _flash_footprint)


@contextmanager
def _caches_apart() -> Iterator[None]:
    """Let no tensor without values stay in a cache that a real step reads."""
    caches = (
        blocks.layout_of,
        blocks._shared_blocks,
        blocks._offsets,
        fused_attention.rotation_of,
    )
    buffers_before = dict(buffers.tensors)

    def clear() -> None:
        for cache in caches:
            cache.cache_clear()
        buffers.tensors.clear()

    clear()
    try:
        yield
    finally:
        clear()
        buffers.tensors.update(buffers_before)
