"""The parts of a model that text does not reach: the image and audio modules of a checkpoint whose
language model is trained, such as Gemma 3's vision tower. They get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from xtuner.errors import ModelError
from xtuner.models.check.training_pass import text_decoder


def outside_text(model: Any) -> dict[str, nn.Module]:
    """The modules of `model`, by name, that are outside its text decoder and output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is None or (decoder := text_decoder(model)) is model:
        return {}
    reached = {id(module) for part in (decoder, head) for module in part.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) not in reached and not any(m is decoder for m in module.modules())
    }


def named_outside_text(model: Any, names: Sequence[str]) -> list[str]:
    """The modules of `outside_text` that `names` select, as PEFT does: by their last parts.

    Raises:
        ModelError: Text reaches none of the modules that a name selects.
    """
    outside = outside_text(model)
    found: list[str] = []
    for name in names if outside else ():
        all_named = [n for n, _ in model.named_modules() if f".{n}".endswith(f".{name}")]
        unreached = [n for n in all_named if n in outside]
        if unreached and len(unreached) == len(all_named):
            raise ModelError(
                f"lora_target_modules, lora_modules_to_save: {name!r} only names parts for images "
                f"or audio ({unreached[0]}), which text does not reach, so they cannot be trained"
            )
        found += unreached
    return found


def freeze_outside_text(model: Any) -> None:
    """Freeze what text does not reach: in full tuning it would take part without a gradient."""
    for module in outside_text(model).values():
        module.requires_grad_(False)


def note_on_frozen(model: Any) -> str | None:
    """A note on the weights that `freeze_outside_text` freezes; None if there are none."""
    weights = {id(p): p for module in outside_text(model).values() for p in module.parameters()}
    count = sum(parameter.numel() for parameter in weights.values())
    return f"{count:,} weights are frozen, since text does not reach them" if count else None
