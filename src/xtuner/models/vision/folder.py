"""The folder of a LLaVA model's trained parts.

    iter_N/   projector/model.safetensors  config.json          always
              llm_adapter/             or  llm/                 where the language model is trained
              visual_encoder_adapter/  or  visual_encoder/      where the vision tower is
              run.yaml  tokenizer

Each part can be used alone: the adapters are PEFT adapters of the language model and of the vision
tower. Folders written by xtuner 0.1 have the same names and can be read, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xtuner.errors import ModelError
from xtuner.hub import old_pth
from xtuner.hub.json_files import write_object
from xtuner.hub.weight_files import tensors_of
from xtuner.models.references import checkpoint_of
from xtuner.models.run_info import RunInfo

PROJECTOR, LLM, ENCODER = "projector", "llm", "visual_encoder"
LLM_ADAPTER, ENCODER_ADAPTER = "llm_adapter", "visual_encoder_adapter"

_OLD_NAMES = {"model.0.": "linear_1.", "model.2.": "linear_2."}
_PREFIX = re.compile(r"^(model\.)?multi_modal_projector\.")


def is_llava_folder(folder: Path) -> bool:
    """Whether `folder` contains the parts of a LLaVA model."""
    return (folder / PROJECTOR).is_dir()


def run_of(folder: Path) -> RunInfo | None:
    """The run that wrote `folder`, from its run.yaml or that of the LLaVA model it is part of."""
    info = RunInfo.read(folder)
    return RunInfo.read(folder.parent) if info is None and is_llava_folder(folder.parent) else info


def save_projector(
    llava: Any, folder: Path, *, trained: Mapping[str, Tensor] | None = None
) -> None:
    """Write the projector; `trained` replaces its own weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {**llava.model.multi_modal_projector.state_dict(), **(trained or {})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "visual_hidden_size": llava.config.vision_config.hidden_size,
        "llm_hidden_size": llava.config.get_text_config().hidden_size,
        "hidden_act": llava.config.projector_hidden_act,
        "visual_select_layer": llava.config.vision_feature_layer,
        "depth": 2,
    }
    write_object(folder / "config.json", config)


def load_projector(llava: Any, folder: Path) -> None:
    """Load the projector in `folder` into `llava`.

    Args:
        folder: A projector, a folder of parts that has one, or a complete LLaVA model.

    Raises:
        ModelError: It does not exist or has another shape.
    """
    found = read_projector(folder)
    projector = llava.model.multi_modal_projector
    wanted = {name: tuple(p.shape) for name, p in projector.named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if shapes != wanted:
        differing = sorted(n for n in {*wanted, *shapes} if wanted.get(n) != shapes.get(n))
        name = differing[0]
        raise ModelError(
            f"{folder}: the projector does not fit this language model and vision tower: {name} "
            f"is {shapes.get(name, 'missing')} and must be {wanted.get(name, 'absent')}"
        )
    projector.load_state_dict(found)


def read_projector(folder: Path) -> dict[str, Tensor]:
    """The tensors ``linear_1.weight`` ... of the projector in `folder`; see `load_projector`.

    Raises:
        ModelError: It does not exist.
    """
    if old_pth.is_old(folder):
        tensors = old_pth.parts(old_pth.read(folder)).get(PROJECTOR, {})
        return {renamed: t for n, t in tensors.items() if (renamed := _projector_name(n))}
    folder = checkpoint_of(folder)
    path = folder / PROJECTOR if is_llava_folder(folder) else folder
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= {_projector_name(n): t for n, t in tensors_of(file, _projector_name).items()}
    if not found:
        names = ", ".join(sorted(p.name for p in path.glob("*"))[:8]) if path.is_dir() else ""
        raise ModelError(
            f"{folder}: contains no projector (found: {names or 'no such folder'}); give a "
            "checkpoint iter_N of a run with a vision tower, or its folder projector/"
        )
    return found


def other_parts(folder: Path) -> list[str]:
    """The parts other than the projector in `folder`, which `load_projector` leaves out."""
    if old_pth.is_old(folder):
        return [name for name in old_pth.part_names(folder) if name != PROJECTOR]
    names = (LLM, LLM_ADAPTER, ENCODER, ENCODER_ADAPTER)
    return [name for name in names if (checkpoint_of(folder) / name).is_dir()]


def projectors_beside(path: Path) -> list[str]:
    """Siblings of the missing folder `path` whose newest checkpoint has a projector."""
    folders = [pointer.parent for pointer in sorted(path.parent.glob("*/last_checkpoint"))]
    return [str(folder) for folder in folders if is_llava_folder(checkpoint_of(folder))]


def _projector_name(name: str) -> str:
    """`name` without the prefix that it has in a complete model; empty for other tensors."""
    name = _PREFIX.sub("", name)
    for old, new in _OLD_NAMES.items():
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name if re.fullmatch(r"linear_[12]\.(weight|bias)", name) else ""
