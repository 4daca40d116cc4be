"""The parts of a model that text does not reach: the image and audio modules of a checkpoint whose
language model is trained, such as Gemma 3's vision tower. They get no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from xtuner.errors import count
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


def selected(model: Any, name: str) -> list[str]:
    """The names of the modules of `model` that `name` selects as a target of adapters: those that
    end with it, in entire parts between dots."""
    return [n for n, _ in model.named_modules() if name and f".{n}".endswith(f".{name}")]


def named_outside_text(model: Any, names: Sequence[str]) -> list[str]:
    """The modules of `outside_text` that `names` select."""
    outside = outside_text(model)
    return [n for name in names if outside for n in selected(model, name) if n in outside]


def only_outside_text(model: Any, names: Sequence[str]) -> Iterator[str]:
    """Yield a problem for each name that selects modules, and none that text reaches."""
    outside = outside_text(model)
    for name in names if outside else ():
        found = selected(model, name)
        if found and all(n in outside for n in found):
            yield (
                f"lora_target_modules, lora_modules_to_save: {name!r} only names parts for images "
                f"or audio ({found[0]}), which text does not reach, so they cannot be trained"
            )


def saved_within_text(model: Any, names: Sequence[str]) -> list[str]:
    """Names for PEFT's `modules_to_save`, which selects modules by the ends of their names. A name
    that also selects parts outside text is replaced by the full names of the others."""
    outside = outside_text(model)
    result: list[str] = []
    for name in names:
        found = [n for n, _ in model.named_modules() if n.endswith(name)]
        kept = [n for n in found if not any(f"{o}.".startswith(f"{n}.") for o in outside)]
        result += [name] if len(kept) == len(found) else kept
    return result


def freeze_outside_text(model: Any) -> None:
    """Freeze what text does not reach: in full tuning it would take part without a gradient."""
    for module in outside_text(model).values():
        module.requires_grad_(False)


def note_on_frozen(model: Any) -> str | None:
    """A note on the weights that `freeze_outside_text` freezes; None if there are none."""
    weights = {id(p): p for module in outside_text(model).values() for p in module.parameters()}
    number = sum(parameter.numel() for parameter in weights.values())
    frozen = count(number, "weight is", "weights are")
    return f"{frozen} frozen: not reached by text" if number else None
