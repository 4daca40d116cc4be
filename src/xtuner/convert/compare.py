"""Compare the logits of a merged model with those of its base model and adapter."""

from __future__ import annotations

import gc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from xtuner.errors import ModelError
from xtuner.kernels.attention.packed import without_cudnn
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model, load_tokenizer, quiet_transformers
from xtuner.models.quantize import Rounding
from xtuner.models.vocabulary import num_embeddings, tokens_of_adapter

_TEXT = "Question: Who are you, and what is the capital of France?\nAnswer: 我是一个小助手。Paris."

TOLERANCE = 1e-4
"""Accepted difference relative to the largest logit, in addition to that of rounding."""
NOTABLE = 5e-2
"""Difference by rounding, relative to the largest logit, above which a warning is printed."""
SPREAD = 3
"""How much larger than the measured rounding another way of rounding may be."""


@dataclass(frozen=True)
class Difference:
    """Largest differences of logits.

    Attributes:
        of_merged: Merged against base + adapter.
        of_adapter: Base against base + adapter, the effect of the adapter.
        of_rounding: Base + adapter with weights merged in memory and rounded to the number type of
            the files, against base + adapter. It depends on depth and size of the model, so it is
            measured; None if PEFT cannot merge the adapter.
        largest: The largest logit of base + adapter.
    """

    of_merged: float
    of_adapter: float
    of_rounding: float | None
    largest: float

    @property
    def relative(self) -> float:
        """`of_merged` relative to the largest logit; infinite if logits are not finite."""
        return self._share(self.of_merged)

    @property
    def explained(self) -> float:
        """The part of `relative` that rounding explains."""
        if self.of_rounding is None:
            return NOTABLE
        return TOLERANCE + SPREAD * self._share(self.of_rounding)

    @property
    def is_wrong(self) -> bool:
        """Whether the files hold another model than base + adapter."""
        return self.relative > self.explained

    def _share(self, difference: float) -> float:
        share = difference / max(self.largest, 1e-12)
        return share if share == share else float("inf")


def load_plain(llm: str, *, dtype: torch.dtype, device: str, trust_remote_code: bool) -> Any:
    """Load `llm` with unquantized weights; a model that is stored quantized is dequantized."""
    model = load_model(llm, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if getattr(model, "is_quantized", False):
        with quiet_transformers():
            model = model.dequantize().to(dtype)
        # Otherwise save_pretrained of transformers 5.23 tries to pack the weights again, and fails.
        model._weight_conversions = None
    return model.eval()


@torch.no_grad()
def compare(
    llm: str,
    adapter: Path,
    merged: Path,
    *,
    dtype: torch.dtype,
    stored: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    rounding: Rounding | None = None,
) -> Difference:
    """Compute the logits of base + adapter, of the base alone, of base + adapter with rounded
    weights and of `merged`, in this order.

    Args:
        dtype: The dtype of weights and computation of all models.
        stored: The number type of the files of `merged`.
        device: 'cpu' or 'cuda'.
        trust_remote_code: Run Python code that ships with the model.
        rounding: The quantization of the base weights during training.
    """
    options: dict[str, Any] = {
        "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code
    }  # fmt: skip
    base = load_plain(llm, **options)
    if rounding:
        rounding.apply(base)
    tokens = min(num_embeddings(base), tokens_of_adapter(adapter)[0] or num_embeddings(base))
    ids = _probe(merged, tokens, trust_remote_code).to(device)
    with warnings.catch_warnings():
        # PEFT warns about tied embeddings, which the merge unties.
        warnings.filterwarnings("ignore", message=".*tie")
        model = load_adapter(base, adapter).eval()
    expected = _logits(model, ids)
    with model.disable_adapter():
        without = _logits(model, ids)
    rounded = _logits(model, ids) if _merge_rounded(model, stored) else None
    del base, model
    gc.collect()
    actual = _logits(load_plain(str(merged), **options), ids)
    return Difference(
        of_merged=float((actual - expected).abs().max()),
        of_adapter=float((without - expected).abs().max()),
        of_rounding=None if rounded is None else float((rounded - expected).abs().max()),
        largest=float(expected.abs().max()),
    )


def _merge_rounded(model: Any, stored: torch.dtype) -> bool:
    """Merge the adapter of `model` in place and round all weights to `stored`.

    Returns False if PEFT cannot merge it: if the adapter changes a head that shares its weights
    with the embedding, merging unties them.
    """
    causal = model.get_base_model()
    if causal.config.tie_word_embeddings and hasattr(causal.get_output_embeddings(), "base_layer"):
        return False
    try:
        model.merge_adapter()
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(parameter.to(stored))
    return True


def fitting_dtype(num_parameters: int, dtype: torch.dtype, *, device: str) -> torch.dtype | None:
    """float32 if a model of that size fits into memory, else `dtype` if it fits, else None."""
    free = psutil.virtual_memory().available
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    fits = (t for t in (torch.float32, dtype) if 1.2 * num_parameters * t.itemsize < free)
    return next(fits, None)


def _logits(model: Any, ids: Tensor) -> Tensor:
    with without_cudnn(ids.device):
        return model(input_ids=ids, use_cache=False).logits[0].float().cpu()  # type: ignore[no-any-return]


def _probe(folder: Path, vocabulary: int, trust_remote_code: bool) -> Tensor:
    """Token ids ``[1, T]`` of the test text; arbitrary ids if there is no tokenizer."""
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        ids = torch.tensor(tokenizer(_TEXT)["input_ids"])
    except ModelError:
        ids = torch.arange(40) * 7919 + 13
    return (ids % vocabulary)[None]
