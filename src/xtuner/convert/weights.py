"""Read the weights of a folder tensor by tensor, and write them shard by shard.

Names, dtypes and shapes are known without reading the tensors, so shards are planned first and only
one is in memory at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xtuner.errors import ConfigError, ModelError
from xtuner.hub.json_files import write_object
from xtuner.hub.weight_files import ADAPTER_FILES, adapter_file, unpickled
from xtuner.models.original import with_dtype

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
    """Parse a size in bytes: '2GB' is 2·10⁹, '512MiB' is 512·2²⁰.

    Raises:
        ConfigError: `text` is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    size = float(match[1]) * {**_UNITS, **_BINARY}.get(match[2], 0) if match else 0
    if size < 1:
        raise ConfigError(f"max_shard_size = {text!r}: must be a size such as '2GB' or '500MB'")
    return int(size)


@dataclass(frozen=True)
class Stored:
    """File, dtype and shape of a tensor, known without reading it."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


class Weights:
    """The tensors in `files` by name, read on access.

    Args:
        files: *.safetensors files, or *.bin files that contain only tensors.

    Raises:
        ModelError: A file is missing or damaged, or contains other objects than tensors.
    """

    def __init__(self, files: list[Path]):
        self.files = files
        self.stored: dict[str, Stored] = {}
        self._bin: tuple[Path, dict[str, Tensor]] | None = None
        for file in files:
            self.stored |= self._describe(file)

    @classmethod
    def of_model(cls, folder: Path, *, safetensors_only: bool = False) -> Weights:
        """The weights of the model in `folder`, from its safetensors or otherwise its .bin files.

        Raises:
            ModelError: There are none, or they are damaged.
        """
        for stem, suffix in _STEMS[:1] if safetensors_only else _STEMS:
            index = folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                return cls._indexed(index)
            if (folder / f"{stem}.{suffix}").is_file():
                return cls([folder / f"{stem}.{suffix}"])
        expected = "model*.safetensors" + ("" if safetensors_only else " or pytorch_model*.bin")
        raise ModelError(f"{folder}: is not a model: it contains no {expected}")

    @classmethod
    def _indexed(cls, index: Path) -> Weights:
        try:
            mapped = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = list(dict.fromkeys(mapped.values()))
            outside = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: is not a weight index: {error!r}") from error
        if outside:
            raise ModelError(f"{index}: names {outside[0]!r}, which is outside the folder")
        weights = cls([index.parent / name for name in names])
        missing = [name for name in mapped if name not in weights.stored]
        if missing:
            raise ModelError(f"{index}: lists {missing[0]!r}, which is in none of its files")
        weights.stored = {name: s for name, s in weights.stored.items() if name in mapped}
        return weights

    @classmethod
    def of_adapter(cls, folder: Path) -> Weights:
        """The weights of the PEFT adapter in `folder`.

        Raises:
            ModelError: There are none, or they are damaged.
        """
        if file := adapter_file(folder):
            return cls([file])
        raise ModelError(
            f"{folder}: is not an adapter: it contains no {' or '.join(ADAPTER_FILES)}"
        )

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor, on the CPU."""
        file = self.stored[name].file
        if file.suffix != ".safetensors":
            return self._unpickled(file)[name].contiguous().clone()
        with safe_open(str(file), framework="pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]

    def _describe(self, file: Path) -> dict[str, Stored]:
        if not file.is_file():
            raise ModelError(f"{file}: is missing; download or copy the model again")
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
            raise ModelError(f"{file}: is damaged: {error}; download or copy it again") from error
        except KeyError as error:
            raise ModelError(f"{file}: contains a tensor of unsupported dtype {error}") from error

    def _unpickled(self, file: Path) -> dict[str, Tensor]:
        if self._bin is None or self._bin[0] != file:
            self._bin = None  # free it before reading the next
            self._bin = file, unpickled(file)
        return self._bin[1]


@dataclass(frozen=True)
class Planned:
    """A tensor to write."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size on disk."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def cast_plan(stored: Mapping[str, Stored], dtype: torch.dtype | None) -> dict[str, Planned]:
    """Plan to write `stored` with floating-point tensors cast to `dtype`; None keeps the dtypes."""
    return {
        name: Planned(dtype if dtype and s.dtype.is_floating_point else s.dtype, s.shape)
        for name, s in stored.items()
    }


def total_bytes(plan: Mapping[str, Planned]) -> int:
    """Total bytes of the tensors in `plan`."""
    return sum(planned.num_bytes for planned in plan.values())


def main_dtype(plan: Mapping[str, Planned]) -> torch.dtype:
    """The floating-point dtype with the most bytes."""
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
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the tensors of `plan` as model*.safetensors, with an index if there are several files.

    Args:
        folder: The target folder.
        plan: The tensors to write, in order.
        read: Returns the tensor of a name; it is cast to the planned dtype.
        max_bytes: Maximum size of a shard; a larger tensor gets a shard of its own.
        log: Receives a message for each shard.
    """
    shards = _group(plan, max_bytes)
    count = len(shards)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        part = f"-{number:05d}-of-{count:05d}" if count > 1 else ""
        file = f"model{part}.safetensors"
        tensors = {name: read(name).to(plan[name].dtype).cpu().contiguous() for name in names}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        del tensors
        weight_map |= dict.fromkeys(names, file)
        log(f"Shard {number} of {count}: {file}")
    if count > 1:
        index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map}
        write_object(folder / "model.safetensors.index.json", index)


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
    """Write `source`/config.json to `folder` for unquantized weights of type `dtype`.

    Args:
        untie: The output head is no longer tied to the input embedding.

    Raises:
        ModelError: ``config.json`` cannot be read.
    """
    file = source / "config.json"
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    config.pop("quantization_config", None)
    config = with_dtype(config, str(dtype).removeprefix("torch."))
    if untie:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    write_object(folder / "config.json", config)
