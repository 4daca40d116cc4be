"""Convert a checkpoint of XTuner 0.x (``iter_N.pth``) to a folder of this version.

    iter_768.pth ──llm.*────────────► adapter, or model
                 ├─projector.*──────► projector/
                 └─visual_encoder.*─► visual_encoder_adapter/, or visual_encoder/

The file contains only weights; the settings have the adapters' rank and scale, the base model and
the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xtuner.config.schema import Settings
from xtuner.errors import CheckpointError
from xtuner.hub import old_pth
from xtuner.hub.json_files import write_object
from xtuner.models import original
from xtuner.models.run_info import RunInfo
from xtuner.models.vision import folder as layout

_LORA = re.compile(r"\.lora_(?:embedding_)?[AB](?:\.weight)?$")


@contextmanager
def as_folder(path: Path, settings: Settings, *, beside: Path) -> Iterator[Path]:
    """A temporary folder with the contents of the old checkpoint `path`; see `write_folder`.

    It is next to `beside`, whose disk has room for the result, unlike perhaps /tmp.
    """
    beside.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".xtuner-", dir=beside.absolute().parent) as name:
        folder = Path(name) / path.stem
        write_folder(path, settings, folder)
        yield folder


def write_folder(path: Path, settings: Settings, folder: Path) -> None:
    """Write the old checkpoint `path` to `folder`, in the layout of this version.

    Args:
        path: A file or DeepSpeed's folder.
        settings: The settings of the run that wrote it.
        folder: A new folder.

    Raises:
        CheckpointError: It cannot be read, or does not fit the settings.
    """
    parts = old_pth.parts(old_pth.read(path))
    folder.mkdir(parents=True)
    vision = settings.has_vision
    if ("projector" in parts or "visual_encoder" in parts) and not vision:
        raise CheckpointError(
            f"{path}: holds parts of a LLaVA model ({', '.join(sorted(parts))}), but the settings "
            "have no visual_encoder_name_or_path; give the config of its run"
        )
    if vision and "projector" not in parts:
        raise CheckpointError(f"{path}: holds no projector, but the settings have a vision tower")
    if projector := parts.get("projector"):
        write_tensors(folder / layout.PROJECTOR, "model.safetensors", projector)
    if encoder := parts.get("visual_encoder"):
        _write_encoder(folder, settings, encoder)
    if llm := parts.get("llm"):
        _write_llm(folder, settings, llm, path)
    elif not vision:
        raise CheckpointError(f"{path}: holds no weights of a language model")
    _run_info(settings).write(folder)


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    """Write `tensors` to the file `name` in `folder`, which is created."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, tensor in tensors.items():  # safetensors refuses tensors that share their memory
        storage = tensor.untyped_storage().data_ptr()
        apart[key] = (tensor.clone() if storage in seen else tensor).detach().contiguous()
        seen.add(storage)
    save_file(apart, str(folder / name), metadata={"format": "pt"})


def _write_llm(folder: Path, s: Settings, tensors: dict[str, Tensor], path: Path) -> None:
    if not any(_LORA.search(name) for name in tensors):
        _write_model(folder / layout.LLM if s.has_vision else folder, s, tensors, path)
        return
    target = folder / layout.LLM_ADAPTER if s.has_vision else folder
    config = _adapter_config(
        tensors,
        alpha=s.effective_lora_alpha,
        base=s.pretrained_model_name_or_path,
        task="CAUSAL_LM",
    )
    _write_adapter(target, config, tensors)


def _write_encoder(folder: Path, s: Settings, tensors: dict[str, Tensor]) -> None:
    if any(_LORA.search(name) for name in tensors):
        config = _adapter_config(
            tensors,
            alpha=s.visual_encoder_lora_alpha,
            base=s.visual_encoder_name_or_path or "",
            task=None,
        )
        _write_adapter(folder / layout.ENCODER_ADAPTER, config, tensors)
        return
    target = folder / layout.ENCODER
    write_tensors(target, "model.safetensors", tensors)
    _copy_config(s.visual_encoder_name_or_path or "", target, ("*.json",))


def _write_model(target: Path, s: Settings, tensors: dict[str, Tensor], path: Path) -> None:
    write_tensors(target, "model.safetensors", tensors)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    base = _copy_config(s.pretrained_model_name_or_path, target, ())
    if base is None:
        raise CheckpointError(
            f"{path}: contains a complete model; its config.json and tokenizer come from "
            f"{s.pretrained_model_name_or_path}, which is not on this machine; fetch it first"
        )
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    write_object(target / "config.json", original.with_dtype(config, dtype))
    original.copy_code(base, target, config)


def _copy_config(name: str, target: Path, patterns: tuple[str, ...]) -> Path | None:
    base = original.folder_of(name)
    if base is not None:
        original.copy_files(base, target, patterns or ("generation_config.json",))
        if not patterns:
            original.copy_files(base, target, original.TOKENIZER_FILES)
    return base


def _adapter_config(
    tensors: dict[str, Tensor], *, alpha: float, base: str, task: str | None
) -> dict[str, Any]:
    downs = {n: t for n, t in tensors.items() if re.search(r"\.lora_(?:embedding_)?A", n)}
    rank = next(iter(downs.values())).shape[0]
    layers = {_LORA.sub("", name).rpartition(".")[2] for name in downs}
    saved = {n.rsplit(".", 2)[1] for n in tensors if not _LORA.search(n)}
    return {
        "peft_type": "LORA", "task_type": task, "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": sorted(layers), "modules_to_save": sorted(saved) or None,
        "base_model_name_or_path": base, "init_lora_weights": True,
    }  # fmt: skip


def _write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    prefix = "base_model.model."
    named = {n if n.startswith(prefix) else f"{prefix}{n}": t for n, t in tensors.items()}
    write_tensors(folder, "adapter_model.safetensors", named)
    write_object(folder / "adapter_config.json", config)


def _run_info(s: Settings) -> RunInfo:
    base = s.pretrained_model_name_or_path
    encoder = s.visual_encoder_name_or_path or ""
    return RunInfo(
        kind="llava" if s.has_vision else "adapter" if s.uses_adapter else "model",
        base_model=str(Path(base).resolve()) if Path(base).is_dir() else base,
        prompt_template=s.prompt_template,
        system=s.SYSTEM,
        settings=s.model_dump(mode="json"),
        visual_encoder=str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder,
    )
