"""LoRA adapters (arXiv:2106.09685): ``y = W x + (alpha / r) B A x`` with W frozen and A, B trained.

PEFT creates, names and saves the adapters; their forward pass is `kernels.lora_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from xtuner.errors import ModelError
from xtuner.hub.weight_files import tensors_of
from xtuner.kernels.lora.layers import layer_classes
from xtuner.models.old_adapters import fitting_llm_adapter

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
        target_modules: names of layers, or 'all-linear' (all but the output head and those of
            `OUTSIDE_PEFT`).
        modules_to_save: names of layers trained in full.
        seed: fixes the first values of A (B begins at zero); the global random state is kept.
        task_type: PEFT's word for what the model does; None for a vision tower.

    Raises:
        ModelError: a name fits no layer.
    """
    from peft import LoraConfig, get_peft_model

    whole = list(target_modules) == ["all-linear"]
    config: Any = model.config
    outside = OUTSIDE_PEFT.get(config.model_type)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if whole else list(target_modules),
        exclude_modules=outside if whole else None,
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
        first = str(error).splitlines()[0]
        raise ModelError(
            f"{folder}: the adapter does not fit the model "
            f"{getattr(model, 'name_or_path', '')!r}: {first}"
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
    saved = tensors_of(file)
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
