"""The change of a LoRA adapter to each tensor of its base model's files.

    lora_A, lora_B ──► W + scaling · B A     modules_to_save ──► the saved tensor

The changes are derived from the tensor names, without a model. Anything unsupported raises
`NeedsModel`, and PEFT merges it in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xtuner.convert.weights import Stored, Weights
from xtuner.errors import ModelError

_UNDERSTOOD = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern",
    "base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_type",
    "auto_mapping", "peft_version", "init_lora_weights",
}  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that do not modify the base model's weights."""

_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?$")
HEAD = "lm_head.weight"


class NeedsModel(Exception):
    """The adapter cannot be merged file by file; the message says why."""


@dataclass(frozen=True)
class Change:
    """The change of one tensor.

    Attributes:
        source: The tensor of the base model to change.
        replacement: The tensor of the adapter that replaces it, if any.
        down, up: Names of A ``[r, in]`` and B ``[out, r]`` in the adapter.
        scaling: Factor of ``B A``.
        transposed: The weight is an embedding, to which ``(B A)`` is added transposed.
    """

    source: str
    replacement: str = ""
    down: str = ""
    up: str = ""
    scaling: float = 1.0
    transposed: bool = False

    def apply(self, base: Callable[[str], Tensor], adapter: Weights, *, device: str) -> Tensor:
        """The changed tensor, computed in float32; the caller casts it. `base` reads a tensor of
        the base model."""
        if self.replacement:
            return adapter[self.replacement]
        weight = base(self.source)
        if not self.down:
            return weight
        down, up = (adapter[name].to(device, torch.float32) for name in (self.down, self.up))
        delta = up @ down
        return weight.to(device, torch.float32).add_(
            delta.T if self.transposed else delta, alpha=self.scaling
        )

    def shape(self, adapter: Weights) -> tuple[int, ...] | None:
        """The shape of the weight that the adapter expects; None if unknown."""
        if self.replacement:
            return adapter.stored[self.replacement].shape
        if not self.down:
            return None
        rows, columns = adapter.stored[self.up].shape[0], adapter.stored[self.down].shape[1]
        return (columns, rows) if self.transposed else (rows, columns)


def changes(
    adapter: Weights,
    config: Mapping[str, Any],
    base: Mapping[str, Stored],
    base_config: Mapping[str, Any],
) -> dict[str, Change]:
    """The change of each tensor that `adapter` modifies, by name.

    If output head and input embedding are tied and the adapter modifies one of them, the result
    contains both.

    Args:
        adapter: Tensors of the adapter.
        config: Its adapter_config.json.
        base: Tensors in the base model's files.
        base_config: The base model's config.json.

    Raises:
        NeedsModel: This module does not support the adapter or the base model.
        ModelError: The adapter belongs to another model.
    """
    _check_kind(config, base_config)
    found = {HEAD: Change(embedding)} if (embedding := _tied(adapter, base, base_config)) else {}
    for name in adapter.stored:
        inner = name.removeprefix(_PREFIX)
        lora = _LORA.fullmatch(inner)
        if lora and lora[3] == "B":
            continue  # handled with its A
        target = f"{lora[1]}.weight" if lora else inner
        source = found[HEAD].source if target == HEAD and HEAD in found else target
        if source not in base or not base[source].dtype.is_floating_point:
            raise NeedsModel(f"the base model's files contain no unquantized tensor {source}")
        found[target] = (
            _low_rank(name, lora, source, adapter, config) if lora else Change(source, name)
        )
    _check_shapes(found, adapter, base)
    return found


def _check_kind(config: Mapping[str, Any], base_config: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise NeedsModel(f"the adapter is of type {config.get('peft_type')}")
    if "quantization_config" in base_config:
        raise NeedsModel("the base model is stored quantized")
    defaults = LoraConfig().to_dict()
    for name, value in config.items():
        plain = name in _UNDERSTOOD or value in (None, False, [], {}, defaults.get(name))
        if not plain or (name == "init_lora_weights" and value not in _PLAIN_STARTS):
            raise NeedsModel(f"the adapter has {name} = {value!r}")


def _tied(adapter: Weights, base: Mapping[str, Stored], config: Mapping[str, Any]) -> str | None:
    """The embedding that the head is tied to, if the adapter modifies either of them."""
    embeddings = [name for name in base if name.endswith("embed_tokens.weight")]
    touched = any(re.search(r"(embed_tokens|lm_head)\.", name) for name in adapter.stored)
    tied = HEAD not in base or config.get("tie_word_embeddings", False)
    if not (touched and tied):
        return None
    if len(embeddings) != 1:
        raise NeedsModel(
            "the adapter modifies an output head that is not in the base model's files"
        )
    return embeddings[0]


def _low_rank(
    name: str, lora: re.Match[str], source: str, adapter: Weights, config: Mapping[str, Any]
) -> Change:
    from peft.utils.other import get_pattern_key

    head, _, tail = name.rpartition("_A")
    up = f"{head}_B{tail}"
    if up not in adapter.stored:
        raise ModelError(f"the adapter is damaged: it contains {name} but not {up}")
    shapes = adapter.stored[name].shape, adapter.stored[up].shape
    if any(len(shape) != 2 for shape in shapes):
        raise NeedsModel(f"{name} is not a matrix")
    rank = shapes[0][0]
    if shapes[1][1] != rank:
        raise ModelError(
            f"the adapter is damaged: {name} has rank {rank}, and {up} has rank {shapes[1][1]}"
        )
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(alphas.keys(), lora[1]), config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Change(source, "", name, up, scaling, transposed=bool(lora[2]))


def _check_shapes(
    found: Mapping[str, Change], adapter: Weights, base: Mapping[str, Stored]
) -> None:
    for target, change in found.items():
        expected, actual = change.shape(adapter), base[change.source].shape
        if expected is not None and expected != actual:
            raise ModelError(
                f"the adapter does not fit the base model: {target} has shape {list(actual)}, "
                f"the adapter expects {list(expected)}; give the model it was trained on"
            )
