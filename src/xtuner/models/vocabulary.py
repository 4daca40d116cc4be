"""The number of tokens of a model: embeddings that grow, and adapters trained on grown ones.

New rows start as the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"), so the model's predictions hardly change. transformers draws around
the mean; here they are the same whenever the model is loaded.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from xtuner.errors import ConfigError, ModelError, count, message_of
from xtuner.models.load import load_tokenizer, quiet_transformers

_EMBEDDING = r"(?:embed_tokens|wte|embed_in|word_embeddings)"
_HEAD = r"(?:lm_head|embed_out|output_layer)"
_SIZES = (
    (re.compile(rf"\b{_EMBEDDING}(?:\.base_layer)?\.weight$"), 0),
    (re.compile(rf"\b{_HEAD}(?:\.base_layer)?\.weight$"), 0),
    (re.compile(rf"\b{_EMBEDDING}\.lora_embedding_A$"), 1),
    (re.compile(rf"\b{_HEAD}\.lora_B\.weight$"), 0),
)
"""Tensors of an adapter that have the number of tokens as a dimension, and which."""


def num_tokens(tokenizer: Any) -> int:
    """One more than the largest id of `tokenizer`."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def num_embeddings(model: Any) -> int:
    """Number of rows of the input embedding of `model`."""
    return int(model.get_input_embeddings().weight.shape[0])


def grow_to_tokenizer(model: Any, path: str, *, trust_remote_code: bool = False) -> range:
    """Give `model` an embedding for every token of the tokenizer at `path`.

    Returns:
        The new rows.

    Raises:
        ModelError: The model's embeddings cannot grow.
    """
    tokens = num_tokens(load_tokenizer(path, trust_remote_code=trust_remote_code))
    old = num_embeddings(model)
    if tokens > old:
        resize(model, tokens)
    return range(old, max(old, tokens))


def growth(model: Any, old: int) -> str:
    """Describe how the embeddings of `model` grew from `old` rows."""
    new = num_embeddings(model)
    if new == old:
        return "resize_embeddings has no effect: the model has an embedding for every token"
    return (
        f"the embeddings grow from {old:,} to {new:,} rows; the new ones start as the mean of the "
        "others and are trained"
    )


def resize(model: Any, tokens: int) -> None:
    """Give input embedding and output head of `model` `tokens` rows; new ones are the mean of the
    old ones.

    Raises:
        ModelError: The model has embeddings in every layer, or transformers cannot resize it.
    """
    old = num_embeddings(model)
    if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise ModelError(
            f"{type(model).__name__}: its embeddings cannot be resized from {old:,} to {tokens:,} "
            "rows, since every layer has embeddings of its own"
        )
    try:
        with quiet_transformers():
            model.resize_token_embeddings(tokens, mean_resizing=False)
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{type(model).__name__}: its embeddings cannot be resized from {old:,} to {tokens:,} "
            f"rows: {message_of(error)}"
        ) from error
    if num_embeddings(model) != tokens:
        raise ModelError(
            f"{type(model).__name__}: its embeddings cannot be resized to {tokens:,} rows"
        )
    head = model.get_output_embeddings()
    layers = [model.get_input_embeddings(), *([head] if head is not None else [])]
    found = [value for layer in layers for value in (layer.weight, getattr(layer, "bias", None))]
    for value in {id(v): v for v in found if v is not None}.values():  # tied weights once
        _fill(value.data, old)


@torch.no_grad()
def _fill(value: torch.Tensor, old: int) -> None:
    """Set the rows of `value` from `old` on to the mean of those before."""
    if len(value) > old and not value.is_meta:
        value[old:] = value[:old].float().mean(0).to(value.dtype)


def trainable_rows(model: Any, rows: range, *, saved: Collection[str]) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices` that train `rows` of the input embedding, and of the output
    head where it is not tied.

    Args:
        model: The grown model, without adapters.
        rows: The new rows.
        saved: Names of layers that are trained completely; they need no entry.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    layers = [embedding] if tied or head is None else [embedding, head]
    names = {id(m): name for name, m in model.named_modules() if any(m is each for each in layers)}
    return {
        names[id(layer)]: list(rows)
        for layer in layers
        if names[id(layer)].rpartition(".")[2] not in {name.rpartition(".")[2] for name in saved}
    }


def check_targets(model: Any, targets: Collection[str]) -> None:
    """Refuse adapters of low rank on layers whose new rows are trained.

    Raises:
        ConfigError: `targets` names the input embedding or the output head.
    """
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is layer for layer in layers)
    }
    if found := sorted(names & {target.rpartition(".")[2] for target in targets}):
        raise ConfigError(
            f"lora_target_modules: resize_embeddings trains the new rows of {', '.join(found)}; "
            "remove it from lora_target_modules, or train it completely by lora_modules_to_save"
        )


def tokens_of_adapter(folder: Path) -> tuple[int | None, int]:
    """The number of tokens of the model that the adapter in `folder` was trained on: exactly, if it
    holds an embedding or a head (else None), and at least, by the tokens that it trains."""
    least = 0
    unreadable = (OSError, ValueError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(*unreadable):
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        indices = config.get("trainable_token_indices") or []
        for some in indices.values() if isinstance(indices, dict) else [indices]:
            least = max([least, *(int(index) + 1 for index in some)])
    sizes = set(_sizes(folder))
    return (sizes.pop() if len(sizes) == 1 else None), max([least, *sizes])


def _sizes(folder: Path) -> Iterator[int]:
    file = folder / "adapter_model.safetensors"
    with contextlib.suppress(OSError, SafetensorError), safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            for pattern, dimension in _SIZES:
                shape = weights.get_slice(name).get_shape()
                if pattern.search(name) and len(shape) > dimension:
                    yield int(shape[dimension])


def tokens_for_adapter(folder: Path, tokens: int) -> int:
    """The number of tokens that a model of `tokens` tokens needs for the adapter in `folder`."""
    exact, least = tokens_of_adapter(folder)
    return exact or max(least, tokens)


def misfit(folder: Path, tokens: int) -> str:
    """How the adapter in `folder` differs from a model of `tokens` tokens; empty if it fits."""
    wanted = tokens_for_adapter(folder, tokens)
    if wanted == tokens:
        return ""
    noun = f"{'more' if wanted > tokens else 'fewer'} token"
    return f"the adapter was trained with {count(abs(wanted - tokens), noun)} than the model has"


def fit_to_adapter(model: nn.Module, folder: Path) -> None:
    """Give `model` as many embeddings as the adapter in `folder` was trained with.

    Raises:
        ModelError: `model` has adapters already, so it cannot change; or cannot be resized.
    """
    embeds = getattr(model, "get_input_embeddings", None)
    embedding = embeds() if callable(embeds) else None
    if embedding is None or not hasattr(embedding, "weight"):
        return
    old = int(embedding.weight.shape[0])
    wanted = tokens_for_adapter(folder, old)
    if wanted == old:
        return
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{folder}: {misfit(folder, old)} ({wanted:,}, not {old:,}), and the model is shared "
            "with other adapters; use this adapter alone"
        )
    resize(model, wanted)
