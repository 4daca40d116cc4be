"""Read the weights of a folder tensor by tensor, and write them shard by shard.

Names, types and shapes are known without reading the tensors, so shards are planned first and at
most one of them is in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xtuner.errors import ConfigError, ModelError

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_STEMS = (("model", "safetensors"), ("pytorch_model", "bin"))


def parse_size(text: str) -> int:
    """Bytes that `text` means: '2GB' is 2·10⁹, '512MiB' 512·2²⁰.

    Raises:
        ConfigError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = float(match[1]) * {**_UNITS, **_BINARY}.get(match[2], 0) if match else 0
    if size < 1:
        raise ConfigError(f"max_shard_size = {text!r}: must be a size such as '2GB' or '500MB'")
    return int(size)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is, known without reading it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors in `files`, by name. Only the one asked for is read.

    Args:
        files: *.safetensors, or *.bin files that hold nothing but tensors.

    Raises:
        ModelError: a file is missing, damaged, or holds other things than tensors.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.stored: dict[str, Stored] = {}
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            self.stored |= self._describe(file)

    @classmethod
    def of_model(cls, folder: Path, *, safetensors_only: bool = False) -> Weights:
        """The weights of the model in `folder`: of its safetensors, or else of its .bin files.

        Raises:
            ModelError: there are none, or they are damaged.
        """
        for stem, ending in _STEMS[:1] if safetensors_only else _STEMS:
            index = folder / f"{stem}.{ending}.index.json"
            if index.is_file():
                return cls._indexed(index)
            if (folder / f"{stem}.{ending}").is_file():
                return cls([folder / f"{stem}.{ending}"])
        kinds = "model*.safetensors" + ("" if safetensors_only else " and no pytorch_model*.bin")
        raise ModelError(f"{folder}: holds no {kinds}, so no model")

    @classmethod
    def _indexed(cls, index: Path) -> Weights:
        try:
            mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = list(dict.fromkeys(mapped.values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: is not an index of weights: {error!r}") from error
        if outside:
            raise ModelError(f"{index}: names {outside[0]!r}, which is outside the folder")
        weights = cls([index.parent / name for name in names])
        lost = [name for name in mapped if name not in weights.stored]
        if lost:
            raise ModelError(f"{index}: lists {lost[0]!r}, which is in none of its files")
        weights.stored = {name: s for name, s in weights.stored.items() if name in mapped}
        return weights

    @classmethod
    def of_adapter(cls, folder: Path) -> Weights:
        """The weights of the PEFT adapter in `folder`.

        Raises:
            ModelError: there are none, or they are damaged.
        """
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (folder / name).is_file():
                return cls([folder / name])
        raise ModelError(f"{folder}: lacks adapter_model.safetensors, so it is no adapter")

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        file = self.stored[name].file
        if file.suffix != ".safetensors":
            return self._unpickled(file)[name].contiguous().clone()
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    def _describe(self, file: Path) -> dict[str, Stored]:
        if not file.is_file():
            raise ModelError(f"{file}: is missing; fetch or copy the model again")
        if file.suffix != ".safetensors":
            found = self._unpickled(file)
            return {n: Stored(file, t.dtype, tuple(t.shape)) for n, t in found.items()}
        try:
            with safe_open(str(file), framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: Stored(file, _TYPES[part.get_dtype()], tuple(part.get_shape()))
                    for name, part in slices.items()
                }
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: is damaged: {error}; fetch or copy it again") from error
        except KeyError as error:
            raise ModelError(f"{file}: holds numbers of the unknown type {error}") from error

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != file:
            self._bin = None  # before the next is read
            self._bin = file, _load_bin(file)
        return self._bin[1]


def _load_bin(file: Path) -> dict[str, Tensor]:
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        try:
            found = torch.load(file, mmap=True, **options)
        except RuntimeError:  # a file in the format before torch 1.6 cannot be mapped
            found = torch.load(file, **options)
    except Exception as error:  # torch raises many kinds for a damaged or refused file
        first = str(error).splitlines()[0]
        raise ModelError(f"{file}: cannot be read as plain weights: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise ModelError(f"{file}: holds other things than named tensors")
    return found


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size on the disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def cast_plan(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Planned]:
    """What `stored` becomes with floating-point tensors in `dtype`; None leaves all as it is."""
    return {
        name: Planned(dtype if dtype and s.dtype.is_floating_point else s.dtype, s.shape)
        for name, s in stored.items()
    }


def total_bytes(plan: Mapping[str, Planned]) -> int:
    """Bytes of all tensors of `plan`."""
    return sum(planned.num_bytes for planned in plan.values())


def main_dtype(plan: Mapping[str, Planned]) -> torch.dtype:
    """The floating-point type that holds most of the weights."""
    sizes: dict[torch.dtype, int] = {}
    for planned in plan.values():
        if planned.dtype.is_floating_point:
            sizes[planned.dtype] = sizes.get(planned.dtype, 0) + planned.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def write_shards(
    folder: Path,
    plan: Mapping[str, Planned],
    read: Callable[[str], Tensor],
    *,
    max_bytes: int,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the tensors of `plan` as model*.safetensors, with an index if there are several files.

    Args:
        folder: where to.
        plan: names in order, with what each will be.
        read: gives the tensor of a name; it is cast to the planned type.
        max_bytes: largest shard; a larger tensor gets a shard of its own.
        tell: gets a line for each shard.
    """
    shards = _group(plan, max_bytes)
    count = len(shards)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = (
            f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        tensors = {name: read(name).to(plan[name].dtype).cpu().contiguous() for name in names}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        del tensors
        where |= dict.fromkeys(names, file)
        tell(f"Shard {number} of {count}: {file}")
    if count > 1:
        index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": where}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _group(plan: Mapping[str, Planned], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, planned in plan.items():
        if shards[-1] and filled + planned.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += planned.num_bytes
    return shards


def write_config(source: Path, folder: Path, *, dtype: torch.dtype, untie: bool = False) -> None:
    """Write `source`/config.json into `folder` for unquantised weights of type `dtype`.

    Args:
        source: the folder of the original model.
        folder: where to.
        dtype: what the weights are now.
        untie: the output head is no longer the input embedding.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if untie:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
