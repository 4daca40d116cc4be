"""Read the tensors of a weight file, safetensors or pickled; damaged files raise `ModelError`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from xtuner.errors import ModelError, first_line

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def adapter_file(folder: Path) -> Path | None:
    """The weight file of the PEFT adapter in `folder`; None if there is none."""
    return next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)


def tensors_of(
    file: Path, select: Callable[[str], object] = lambda name: True
) -> dict[str, Tensor]:
    """The tensors of `file` whose names `select` accepts; from safetensors only these are read.

    Raises:
        ModelError: The file is damaged, or contains more than tensors.
    """
    if file.suffix == ".safetensors":
        with _readable(file), safe_open(str(file), framework="pt") as opened:
            names = [name for name in opened.keys() if select(name)]  # noqa: SIM118
            return {name: opened.get_tensor(name) for name in names}
    return {name: tensor for name, tensor in unpickled(file).items() if select(name)}


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped from disk if its format allows it.

    Raises:
        ModelError: See `tensors_of`.
    """
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with _readable(file):
        try:
            found = torch.load(file, mmap=True, **options)
        except RuntimeError:  # files in the format before torch 1.6 cannot be mapped
            found = torch.load(file, **options)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"{file}: must contain a dict of tensors")
    return found


def names_of(file: Path) -> list[str]:
    """The names of the tensors of `file`.

    Raises:
        ModelError: See `tensors_of`.
    """
    if file.suffix != ".safetensors":
        return list(tensors_of(file))
    with _readable(file), safe_open(str(file), framework="pt") as opened:
        return list(opened.keys())


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # both libraries raise many types for a damaged file
        raise ModelError(f"{file}: cannot be read as weights: {first_line(error)}") from error
