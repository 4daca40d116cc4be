"""LoRA adapters (arXiv:2106.09685): ``y = W x + (alpha / r) B A x`` with W frozen and A, B trained.

PEFT creates, names and saves the adapters; their forward pass is `kernels.lora_layers`.
"""

from __future__ import annotations

import collections
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.errors import ModelError, XTunerError, count, in_one_line
from xtuner.hub.weight_files import adapter_file, names_of, tensors_of
from xtuner.kernels.lora.layers import layer_classes
from xtuner.models.adapter_checks import layer_problems, refusal
from xtuner.models.adapter_config import read_adapter_config
from xtuner.models.old_adapters import fitting_llm_adapter
from xtuner.models.text_path import named_outside_text, outside_text, saved_within_text
from xtuner.models.vocabulary import fit_to_adapter

_FEW = 0.01
"""A smaller share of weights without adapters is not reported."""

OUTSIDE_PEFT = {
    kind: ["out_proj"] for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Linear layers, by model type, that PEFT refuses to adapt because kernels read their weights
directly."""


def add_adapter(
    model: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    seed: int = 0,
    task_type: str | None = "CAUSAL_LM",
    further: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze `model` and add new adapters to its linear layers.

    Args:
        model: A transformers causal language model, quantized or not.
        alpha: The adapters' output is scaled by ``alpha / r``.
        target_modules: Names of layers, or 'all-linear' (all except the output head, those in
            `OUTSIDE_PEFT` and `unsuitable` ones).
        modules_to_save: Names of layers that are trained in full.
        seed: Seed of the initial values of A (B starts at zero); the global random state is
            unchanged.
        task_type: PEFT's task type; None for a vision tower.
        further: Other fields of PEFT's LoraConfig.

    Raises:
        ModelError: A name matches no layer, or none that can be trained.
        ConfigError: PEFT rejects `further`.
    """
    from peft import LoraConfig, get_peft_model

    all_linear = list(target_modules) == ["all-linear"]
    on_meta = next(model.parameters()).is_meta
    model_type: str = getattr(model.config, "model_type", "")
    if problems := list(layer_problems(model, target_modules, modules_to_save)):
        raise ModelError("; ".join(problems))
    outside = [*OUTSIDE_PEFT.get(model_type, ()), *unsuitable(model)] if all_linear else []
    outside += named_outside_text(model, () if all_linear else target_modules)
    targets = list(target_modules)
    if all_linear and _by_layer(further):  # which PEFT combines with names only
        targets = _linear_names(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            config = LoraConfig(
                r=r,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules="all-linear" if targets == ["all-linear"] else targets,
                exclude_modules=outside or None,
                modules_to_save=saved_within_text(model, modules_to_save) or None,
                task_type=task_type,
                **(further or {}),
            )
            config._register_custom_module(layer_classes())
            adapted = get_peft_model(model, config, low_cpu_mem_usage=on_meta)
        except Exception as error:  # PEFT checks few of the values that a user can set
            needs_package = isinstance(error, ImportError) and not further
            if isinstance(error, XTunerError) or needs_package or is_out_of_memory(error):
                raise
            raise refusal(error, further) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _by_layer(further: Mapping[str, Any] | None) -> bool:
    fields = ("layers_to_transform", "layers_pattern")
    return any((further or {}).get(name) is not None for name in fields)


def _linear_names(model: nn.Module) -> list[str]:
    """The last parts of the names of all linear layers but the output head."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not head
        }
    )


def unsuitable(model: Any) -> dict[str, str]:
    """Linear layers of `model` that 'all-linear' skips, by name, with the reason. A router's layers
    may return a tuple, and text does not reach image or audio modules.
    """
    outside = outside_text(model)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        kind = type(module)
        if name in outside:
            found[name] = "not reached by text"
        elif kind.__module__.startswith("transformers") and not _is_plain(module):
            found[name] = f"a {kind.__name__} does more than a linear layer"
    return found


def _is_plain(layer: nn.Linear) -> bool:
    """Whether a subclass computes what a linear layer does, shown with weights of its own: those of
    `layer` may be on the meta device."""
    if type(layer).forward is nn.Linear.forward:
        return True
    weight, x = (torch.arange(n * 3.0, device="cpu").reshape(-1, 3).sin() for n in (5, 8))
    bias = None if layer.bias is None else weight[:, 0]
    given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    x = x.reshape(2, 4, 3)
    try:
        found = torch.func.functional_call(layer, given, (x,))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = F.linear(x, weight, bias)
    same = isinstance(found, Tensor) and found.shape == expected.shape
    return same and torch.allclose(found, expected, atol=1e-5)


def notes_on_adapters(adapted: Any) -> Iterator[str]:
    """Notes on what adapters do not cover; `adapted` is the result of
    `add_adapter`."""
    model, config = adapted.get_base_model(), next(iter(adapted.peft_config.values()))
    if config.exclude_modules:
        skipped = unsuitable(model).items()
        left = collections.Counter(why for name, why in skipped if name in config.exclude_modules)
        for reason, number in left.items():
            layers = count(number, "linear layer gets", "linear layers get")
            yield f"{layers} no adapter: {reason}"
    ends = tuple({name.rpartition(".")[2] for name in config.modules_to_save or ()})
    if alike := [n for n in outside_text(model) if ends and n.endswith(ends)]:
        layers = count(len(alike), "layer with such a name stays", "layers with such names stay")
        yield f"lora_modules_to_save: {layers} frozen: not reached by text"
    made = [m for m in adapted.modules() if hasattr(m, "adapted") and hasattr(m, "lora_A")]
    if slow := sum(layer.adapted() is None for layer in made):
        yield (
            f"{slow:,} of {count(len(made), 'adapter')} {'is' if slow == 1 else 'are'} computed by "
            f"PEFT because of lora_config, which takes more time and memory than xtuner's forward "
            f"pass"
        )
    filters = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    frozen = (p for p in model.parameters() if not p.requires_grad)
    experts = [p for p in frozen if p.ndim == 3 and id(p) not in filters]
    share = sum(p.numel() for p in experts) / max(1, sum(p.numel() for p in model.parameters()))
    if share > _FEW:
        yield (
            f"{share:.0%} of the weights are experts in three-dimensional tensors, which are not "
            f"linear layers: they get no adapters and stay frozen"
        )


def load_adapter(model: nn.Module, folder: str | Path, *, name: str = "default") -> Any:
    """Add the adapter saved in `folder` to `model`.

    Args:
        model: A causal language model, or a result of this function, which gets another adapter.
            Its embeddings get as many rows as the adapter was trained with.
        name: The name by which `set_adapter` selects it.

    Raises:
        ModelError: The folder contains no adapter, or one that does not fit the model.
    """
    from peft import PeftModel

    folder = Path(folder)
    read_adapter_config(folder)
    fit_to_adapter(model, folder)
    try:
        with fitting_llm_adapter(model, folder) as fitted:
            if isinstance(model, PeftModel):
                model.load_adapter(str(fitted), adapter_name=name)
                loaded = model
            else:
                with warnings.catch_warnings():  # `_check_complete` says what is missing
                    warnings.filterwarnings("ignore", message="Found missing adapter keys")
                    loaded = PeftModel.from_pretrained(model, str(fitted), adapter_name=name)
            _check_complete(loaded, name, fitted, folder)
        _check_finite(loaded, name, folder)
        return loaded
    except SafetensorError as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged: {error}") from error
    except (torch.OutOfMemoryError, XTunerError):
        raise
    except Exception as error:  # PEFT checks few of the values that a file can hold
        raise ModelError(
            f"{folder}: the adapter does not fit the model "
            f"{getattr(model, 'name_or_path', '')!r}, or its adapter_config.json is damaged: "
            f"{in_one_line(error, plain=(RuntimeError, ValueError, OSError))}"
        ) from error


_WRITTEN_TWICE = re.compile(r"\.(modules_to_save|token_adapter)\.")
"""Weights that PEFT writes a second time, under a name it does not read: those of saved embeddings
and of a tied output head."""


def _check_complete(adapted: Any, name: str, fitted: Path, folder: Path) -> None:
    """Raise ModelError if PEFT left out weights of the adapter called `name`, or if some of its
    layers got none; `fitted` holds the files of `folder` as they were loaded."""
    from peft import get_peft_model_state_dict

    file = adapter_file(fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on saving
        expected = get_peft_model_state_dict(
            adapted, adapter_name=name, save_embedding_layers=False
        )
    if file is None or set(names_of(file)) == set(expected):
        return
    result = adapted.load_adapter(str(fitted), adapter_name=name)  # PEFT may rename weights
    unexpected = [key for key in result.unexpected_keys if not _WRITTEN_TWICE.search(key)]
    _refuse_partial(folder, list(result.missing_keys), unexpected)


def _refuse_partial(folder: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise ModelError if an adapter's weights and the layers that have one differ."""
    problems = []
    if unexpected:
        problems.append(
            f"{count(len(unexpected), 'weight in it fits', 'weights in it fit')} no layer, such as "
            f"{unexpected[0]}"
        )
    if missing:
        problems.append(
            f"{count(len(missing), 'weight is', 'weights are')} missing that adapter_config.json "
            f"asks for, such as {missing[0]}"
        )
    if problems:
        raise ModelError(
            f"{folder}: only a part of the adapter can be loaded: {'; '.join(problems)}. It was "
            f"trained for another model, or its files come from different training runs"
        )


def _check_finite(adapted: Any, name: str, folder: Path) -> None:
    """Raise ModelError if a weight of the adapter called `name` is not finite."""
    for key, parameter in adapted.named_parameters():
        if f".{name}" in key and not bool(torch.isfinite(parameter).all()):
            raise ModelError(
                f"{folder}: the adapter's weights are not finite ({key}): the run diverged before "
                f"it was saved, or the file is damaged; use another checkpoint"
            )


def load_adapter_weights(adapted: Any, folder: Path) -> None:
    """Load the values saved in `folder` into the adapters of `adapted`, bit for bit.

    Raises:
        ModelError: Names or shapes differ from those of `adapted`.
    """
    from peft import set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder}: lacks adapter_model.safetensors")
    with fitting_llm_adapter(adapted, folder) as fitted:
        saved = tensors_of(fitted / file.name)
    try:
        result = set_peft_model_state_dict(adapted, saved)
    except RuntimeError as error:
        raise ModelError(f"{file}: does not fit the adapters of this run: {error}") from error
    if result.unexpected_keys:
        raise ModelError(
            f"{file}: contains adapters for other layers, such as {result.unexpected_keys[0]}; "
            "lora_r and lora_target_modules must be those of the run that wrote it"
        )
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    _refuse_partial(folder, [key for key in result.missing_keys if key in trained], [])


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of (trainable, all) parameters; a 4-bit weight counts its unpacked elements."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
