"""Checks of the settings of adapters, which need the model's layers but not its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from xtuner.errors import ConfigError, ModelError, XTunerError, did_you_mean, in_one_line
from xtuner.models.text_path import only_outside_text, outside_text, selected

_OWN = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules", "modules_to_save": "lora_modules_to_save",
}  # fmt: skip
_NEED_DATA = ("eva", "corda", "lora_ga", "loftq")


def refusal(error: Exception, further: Mapping[str, Any] | None) -> XTunerError:
    """The error that PEFT raises for the settings of adapters, in one line."""
    words = in_one_line(error, plain=(ValueError, RuntimeError, NotImplementedError))
    if further:
        return ConfigError(f"lora_config = {dict(further)}: {words}")
    return ModelError(f"lora_target_modules, lora_modules_to_save: PEFT refuses them: {words}")


def layer_problems(
    model: nn.Module, target_modules: Sequence[str], modules_to_save: Sequence[str]
) -> Iterator[str]:
    """Yield what is wrong with the names of layers that `add_adapter` gets: one matches no layer,
    or none that text reaches or an adapter can be added to."""
    targets = [] if list(target_modules) == ["all-linear"] else list(target_modules)
    found = {name: selected(model, name) for name in [*targets, *modules_to_save]}
    outside = outside_text(model)
    if wrong := [repr(name) for name, layers in found.items() if not layers]:
        patterns = ". Patterns are not supported: list the names"
        is_pattern = any(set("()[]*|\\") & set(name) for name in wrong)
        yield (
            "lora_target_modules, lora_modules_to_save: the model has no layer "
            f"{', '.join(wrong)}; its linear layers are {', '.join(_linear_layers(model))}"
            f"{patterns if is_pattern else ''}"
        )
    for name in targets:
        layers = [model.get_submodule(n) for n in found[name] if n not in outside]
        if kind := next((type(la).__name__ for la in layers if not _can_have_adapter(la)), None):
            yield (
                f"lora_target_modules: {name!r} is a {kind}, which cannot get an adapter; name "
                "linear layers, or train it completely by lora_modules_to_save"
            )
    yield from only_outside_text(model, list(found))
    saved = [layer for name in modules_to_save for layer in found[name]]
    named = [layer for name in targets for layer in found[name]]
    if named and all(_is_within(layer, saved) for layer in named):
        yield (
            "lora_target_modules: lora_modules_to_save trains all of these layers completely, so "
            "none gets an adapter; remove them from one of the two"
        )


def _linear_layers(model: nn.Module) -> list[str]:
    """The last parts of the names of the linear layers that text reaches."""
    outside = outside_text(model)
    linear = (n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in outside)
    return sorted({name.rpartition(".")[2] for name in linear})


def _is_within(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _can_have_adapter(layer: nn.Module) -> bool:
    """Whether `layer` is of a kind that PEFT may adapt: with a matrix, and without parts."""
    if isinstance(layer, nn.Linear | nn.MultiheadAttention):
        return True
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    return not any(layer.children()) and any(tensor.ndim > 1 for tensor in tensors)


def config_problems(further: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the setting `lora_config`: a field does not exist, has its own
    setting, or needs something that a run does not provide."""
    from peft import LoraConfig

    fields = [f.name for f in dataclasses.fields(LoraConfig)]
    found = {name: _field_problem(name, value, fields) for name, value in further.items()}
    yield from (f"lora_config: {problem}" for problem in found.values() if problem)
    others = {name: value for name, value in further.items() if not found[name]}
    try:
        LoraConfig(**others)
    except Exception as error:  # whatever PEFT does with values of a wrong type
        yield str(refusal(error, others))


def _field_problem(name: str, value: Any, fields: Sequence[str]) -> str:
    """What is wrong with a field of LoraConfig; empty if nothing is."""
    if name in _OWN:
        return f"{name}: is the setting {_OWN[name]}"
    if name in ("task_type", "peft_type", "base_model_name_or_path", "exclude_modules"):
        return f"{name}: is set by xtuner; remove it"
    if name not in fields:
        return f"{name}: LoraConfig has no such field{did_you_mean(name, fields)}"
    if name != "init_lora_weights":
        return ""
    if str(value).lower() in _NEED_DATA:
        return (
            f"{name} = {value!r}: needs passes over the data before training, which are not "
            f"supported; use 'pissa', 'olora', 'gaussian' or 'orthogonal'"
        )
    if str(value).lower().startswith("pissa_niter"):
        return (
            f"{name} = {value!r}: changes the base weights by random numbers, so loading the "
            f"checkpoint gives different base weights; use 'pissa', which recomputes the same ones"
        )
    return ""
