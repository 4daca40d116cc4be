"""Read the checkpoints of XTuner 0.x: ``iter_N.pth``, a file, or a folder that DeepSpeed wrote.

torch reads them with ``weights_only``. Besides weights they contain objects of mmengine and numpy
(losses, settings): each class that torch does not know is replaced by one that does nothing, so no
code of the file or of another package runs.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from xtuner.errors import CheckpointError
from xtuner.hub import deepspeed_files


class _Inert:
    """Stands in for an object that is not read."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Keep nothing."""


def is_old(path: Path) -> bool:
    """Whether `path` is a checkpoint of XTuner 0.x."""
    if path.suffix == ".pth" and path.is_file():
        return path.stat().st_size > _ALIAS_BYTES
    return deepspeed_files.folder_of(path) is not None


_ALIAS_BYTES = 200
"""A shorter .pth file names a folder; see `xtuner.engine.checkpoint`."""


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the model in a checkpoint of XTuner 0.x, by their names there.

    Raises:
        CheckpointError: It cannot be read, or holds no weights.
    """
    if folder := deepspeed_files.folder_of(path):
        try:
            return deepspeed_files.read(folder, _loaded)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: is damaged, or written by a version of DeepSpeed that is not known: "
                f"{type(error).__name__}: {error}"
            ) from error
    content = _loaded(path)
    state = content.get("state_dict", content.get("module", content))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: its state_dict is not a dict")
    tensors = deepspeed_files.tensors_in(state)
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights of a model (found: {', '.join(map(str, list(content)[:8]))})"
        )
    return tensors


def _loaded(file: Path) -> dict[str, Any]:
    try:
        unknown = get_unsafe_globals_in_checkpoint(str(file))
    except (ValueError, RuntimeError, OSError):  # not a zip file: written by torch before 1.6
        unknown = []
    stand_ins: list[Any] = [(type("Inert", (_Inert,), {}), name) for name in unknown]
    try:
        with safe_globals(stand_ins):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except Exception as error:  # torch raises many types for a damaged or refused file
        lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
        reason = next((line for line in lines if "GLOBAL" in line), lines[0])
        raise CheckpointError(f"{file}: cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: does not contain a dict")
    return content


def part_names(path: Path) -> list[str]:
    """The parts of a model in the checkpoint `path`: 'llm', 'projector', 'visual_encoder'."""
    return sorted(parts(read(path)))


def parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`tensors` by part: 'llm', 'visual_encoder' and 'projector', with the names of Hugging Face.

    A part with adapters has PEFT's names for them. Names without a part are the language model's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.match(r"(?:module\.)?(llm|visual_encoder|projector)\.(.+)", name)
        part, inner = (match[1], match[2]) if match else ("llm", name)
        found.setdefault(part, {})[inner] = tensor
    return {part: _as_saved_by_peft(held) for part, held in found.items()}


def _as_saved_by_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under PEFT's names, without the frozen weights that DeepSpeed stores with
    an adapter."""
    if any(".base_layer." in name for name in tensors):
        trained = re.compile(r"\.lora_(?:embedding_)?[AB]\b|\.modules_to_save\.")
        tensors = {name: tensor for name, tensor in tensors.items() if trained.search(name)}
    return {_peft_name(name): tensor for name, tensor in tensors.items()}


def _peft_name(name: str) -> str:
    """PEFT writes names without the name of the adapter, ``lora_A.default.weight``, and without
    modules around its own."""
    name = re.sub(r"^.*?\b(?=base_model\.model\.)", "", name)
    name = re.sub(r"(lora_(?:embedding_)?[AB])\.default\b", r"\1", name)
    return re.sub(r"\.modules_to_save\.default\.", ".", name)
