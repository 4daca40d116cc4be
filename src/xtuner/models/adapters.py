"""LoRA adapters (arXiv:2106.09685): ``y = W x + (alpha / r) B A x`` with W frozen and A, B trained.

PEFT creates, names and saves the adapters; their forward pass is `kernels.lora_layers`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from xtuner.errors import ModelError
from xtuner.hub.weight_files import tensors_of
from xtuner.kernels.lora.layers import layer_classes
from xtuner.models.check.training_pass import text_decoder
from xtuner.models.old_adapters import fitting_llm_adapter

_FEW = 0.01
"""A smaller share of weights without adapters is not worth a note."""

OUTSIDE_PEFT = {
    kind: ["out_proj"] for kind in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Linear layers, by model type, that PEFT refuses to adapt: kernels read the weight itself."""


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
) -> Any:
    """Freeze `model` and put fresh adapters beside its linear layers.

    Args:
        model: a causal language model of transformers, quantised or not.
        r: rank.
        alpha: the adapters' output is scaled by ``alpha / r``.
        dropout: share of the adapters' inputs set to zero in training.
        target_modules: names of layers, or 'all-linear' (all but the output head, those of
            `OUTSIDE_PEFT` and those that are `unsuitable`).
        modules_to_save: names of layers trained in full.
        seed: fixes the first values of A (B begins at zero); the global random state is kept.
        task_type: PEFT's word for what the model does; None for a vision tower.

    Raises:
        ModelError: a name fits no layer.
    """
    from peft import LoraConfig, get_peft_model

    whole = list(target_modules) == ["all-linear"]
    outside = [*OUTSIDE_PEFT.get(_kind(model), ()), *unsuitable(model)] if whole else []
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if whole else list(target_modules),
        exclude_modules=outside or None,
        modules_to_save=list(modules_to_save) or None,
        task_type=task_type,
    )
    config._register_custom_module(layer_classes())
    known = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    wrong = [
        n
        for n in (*(() if whole else target_modules), *modules_to_save)
        if n.rpartition(".")[2] not in known
    ]
    if wrong:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ModelError(
            "lora_target_modules, lora_modules_to_save: the model has no layer "
            f"{', '.join(map(repr, wrong))}; "
            f"its linear layers are {', '.join(sorted(linear))}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _kind(model: Any) -> str:
    return str(model.config.model_type)


def unsuitable(model: Any) -> dict[str, str]:
    """Linear layers of `model` by name that 'all-linear' leaves out, and why.

    Layers of a router may return a tuple, and parts for images or sound are not reached by text.
    """
    causal = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None
    decoder = text_decoder(model) if causal else model
    reached = {id(module) for module in decoder.modules()} if decoder is not model else None
    head = model.get_output_embeddings() if causal else None
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        kind = type(module)
        if reached is not None and id(module) not in reached:
            found[name] = "text does not reach them"
        elif kind.forward is not nn.Linear.forward and kind.__module__.startswith("transformers"):
            found[name] = f"a {kind.__name__} does more than a linear layer"
    return found


def notes_on_adapters(adapted: Any) -> Iterator[str]:
    """What adapters on all linear layers do not reach; `adapted` is of `add_adapter`."""
    model, config = adapted.get_base_model(), next(iter(adapted.peft_config.values()))
    if config.exclude_modules:
        left = collections.Counter(unsuitable(model).values())
        for reason, count in left.items():
            layers = "1 linear layer gets" if count == 1 else f"{count:,} linear layers get"
            yield f"{layers} no adapter: {reason}"
    experts = [p for p in model.parameters() if p.ndim == 3 and not p.requires_grad]
    share = sum(p.numel() for p in experts) / max(1, sum(p.numel() for p in model.parameters()))
    if share > _FEW:
        yield (
            f"{share:.0%} of the weights are experts in tensors of three dimensions, which are no "
            "linear layers: they get no adapters and stay as they are"
        )


def load_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, name: str = "default"
) -> Any:
    """Put the adapter saved in `folder` beside the layers of `model`.

    Args:
        model: a causal language model, or one that this function returned, which gets another
            adapter.
        folder: of the adapter.
        trainable: whether its weights are trained.
        name: by which `set_adapter` selects it.

    Raises:
        ModelError: the folder holds no adapter, or one that does not fit the model.
    """
    from peft import PeftModel

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        found = (
            ", ".join(sorted(p.name for p in folder.glob("*")))
            if folder.is_dir()
            else "no such folder"
        )
        raise ModelError(
            f"{folder}: is not an adapter: it lacks adapter_config.json (found: "
            f"{found or 'nothing'})"
        )
    try:
        with fitting_llm_adapter(model, folder) as place:
            if isinstance(model, PeftModel):
                model.load_adapter(str(place), adapter_name=name, is_trainable=trainable)
                return model
            return PeftModel.from_pretrained(
                model, str(place), adapter_name=name, is_trainable=trainable
            )
    except SafetensorError as error:
        raise ModelError(f"{folder}: the adapter's weights are damaged: {error}") from error
    except (RuntimeError, ValueError, OSError) as error:
        told = " ".join(str(error).split())
        raise ModelError(
            f"{folder}: the adapter does not fit the model "
            f"{getattr(model, 'name_or_path', '')!r}: {told}"
        ) from error


def load_adapter_weights(adapted: Any, folder: Path) -> None:
    """Fill the adapters of `adapted` with the values saved in `folder`, bit for bit.

    Raises:
        ModelError: names or shapes differ from those of `adapted`.
    """
    from peft import set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder}: lacks adapter_model.safetensors")
    with fitting_llm_adapter(adapted, folder) as place:
        saved = tensors_of(place / file.name)
    try:
        result = set_peft_model_state_dict(adapted, saved)
    except RuntimeError as error:
        raise ModelError(f"{file}: does not fit the adapters of this run: {error}") from error
    if result.unexpected_keys:
        raise ModelError(
            f"{file}: holds adapters for other layers, such as {result.unexpected_keys[0]}; "
            "lora_r and lora_target_modules must be those of the run that wrote it"
        )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as its unpacked numbers."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        size = int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total
