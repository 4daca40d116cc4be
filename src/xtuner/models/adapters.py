"""LoRA adapters (arXiv:2106.09685): ``y = W x + (alpha / r) B A x`` with W frozen and A, B trained.

PEFT makes, names and saves the adapters. Their forward pass is ours: PEFT multiplies in the
adapters' float32 and casts every activation to it and back; here A and B are stored and optimised
in float32 and multiplied in the type of the activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from xtuner.errors import ModelError
from xtuner.models.low_rank import Adapted, low_rank_linears
from xtuner.models.old_adapters import fitting_llm_adapter
from xtuner.models.stored import tensors_of


class _ActivationTypeForward:
    """The forward pass of a LoRA layer in the number type of its input."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``W x + scaling * B A dropout(x)``; cases other than one plain adapter are
        PEFT's."""
        adapted = None if kwargs else self.adapted()
        if adapted is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        if type(adapted.layer) in _fused_layers() and torch.is_grad_enabled():
            return low_rank_linears(x, (adapted,))[0]
        inner = F.linear(F.dropout(x, adapted.dropout), adapted.down.to(x.dtype))
        up = (adapted.up * adapted.scaling).to(x.dtype)
        return self.base_layer(x) + F.linear(inner, up)  # type: ignore[no-any-return]

    def adapted(self: Any) -> Adapted | None:
        """The layer with its adapter, if that is one plain adapter."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or self.lora_variant:
            return None
        (name,) = active
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        drop = self.lora_dropout[name]
        dropout = drop.p if self.training and isinstance(drop, nn.Dropout) else 0.0
        return Adapted(self.base_layer, down, up, self.scaling[name], dropout)


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Outputs of linear layers that take the same `x`, adapters included; in one operation where
    that can be."""
    parts = adapted_parts(layers) if torch.is_grad_enabled() else None
    return tuple(layer(x) for layer in layers) if parts is None else low_rank_linears(x, parts)


def adapted_parts(layers: Sequence[nn.Module]) -> list[Adapted] | None:
    """Linear layers with their adapters; None unless all have one that `low_rank_linears` can
    take."""
    parts = []
    for layer in layers:
        part = layer.adapted() if isinstance(layer, _ActivationTypeForward) else None
        if part is None or type(part.layer) not in _fused_layers():
            return None
        parts.append(part)
    return parts


@cache
def _fused_layers() -> tuple[type[nn.Module], ...]:
    """Layers whose product with the input `low_rank_linears` can take itself."""
    import bitsandbytes as bnb

    return (nn.Linear, bnb.nn.Linear4bit)


def _layer_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Our LoRA layers by the class of the layer that they wrap; the first match wins."""
    import bitsandbytes as bnb
    from peft.tuners.lora import bnb as peft_bnb
    from peft.tuners.lora.layer import Linear

    def ours(base: type) -> type[nn.Module]:
        return type(f"XTuner{base.__name__}", (_ActivationTypeForward, base), {})

    return {
        bnb.nn.Linear4bit: ours(peft_bnb.Linear4bit),
        bnb.nn.Linear8bitLt: ours(peft_bnb.Linear8bitLt),
        nn.Linear: ours(Linear),
    }


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
        target_modules: names of layers, or 'all-linear' (all but the output head).
        modules_to_save: names of layers trained in full.
        seed: fixes the first values of A (B begins at zero); the global random state is kept.
        task_type: PEFT's word for what the model does; None for a visual encoder.

    Raises:
        ModelError: a name fits no layer.
    """
    from peft import LoraConfig, get_peft_model

    whole = list(target_modules) == ["all-linear"]
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if whole else list(target_modules),
        modules_to_save=list(modules_to_save) or None,
        task_type=task_type,
    )
    config._register_custom_module(_layer_classes())
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


def load_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> Any:
    """Put the adapter saved in `folder` beside the layers of `model`.

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
            return PeftModel.from_pretrained(model, str(place), is_trainable=trainable)
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
