"""Renames the layers of adapters from older code.

    vision_model.encoder...  ──►  encoder...                  encoders had one more level
    attention.wqkv, wo, ...  ──►  self_attn.q_proj, ...       InternLM2's own code

PEFT rejects them, or skips them with only a warning.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from xtuner.hub.weight_files import ADAPTER_FILES, adapter_file, names_of, tensors_of
from xtuner.models.families.internlm2 import QKV, SplitGroups

Config = dict[str, Any]
Tensors = dict[str, Tensor]

_INTERNLM2 = re.compile(r"\.(attention\.(wqkv|wo)|feed_forward\.w[123])\.")
_FUSED = "attention.wqkv"
_WORDS = {
    "wqkv": "(q_proj|k_proj|v_proj)",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "attention": "self_attn",
    "feed_forward": "mlp",
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
}
_WORD = re.compile(rf"\b({'|'.join(_WORDS)})\b")


@contextlib.contextmanager
def fitting_llm_adapter(model: Any, folder: Path) -> Iterator[Path]:
    """`folder`, or a copy that fits `model` if it was trained on InternLM2's own code.

    Its fused ``wqkv`` has one A for the three projections, and a B with grouped rows.
    """
    file = adapter_file(folder)
    fused = any(name.endswith(".wqkv") for name, _ in model.named_modules())
    if file is None or fused or not any(map(_INTERNLM2.search, names_of(file))):
        yield folder
        return

    def renew(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        new = _split(tensors, model.config)
        layers = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in new
                  if ".lora_" in name}  # fmt: skip
        return {
            **config,
            "target_modules": sorted(layers),
            "modules_to_save": [_renamed(n) for n in config.get("modules_to_save") or []] or None,
            "layers_to_transform": None,
            "layers_pattern": None,
            **{
                name: {_renamed(k): v for k, v in (config.get(name) or {}).items()}
                for name in ("rank_pattern", "alpha_pattern")
            },
        }, new

    with _copy(folder, file, renew) as copied:
        yield copied


def _split(tensors: Mapping[str, Tensor], config: Any) -> Tensors:
    found: Tensors = {}
    for name, tensor in tensors.items():
        if _FUSED not in name:
            found[_renamed(name)] = tensor
            continue
        names = [_renamed(name.replace(_FUSED, target)) for target in QKV]
        if ".lora_A." in name:
            found |= {new: tensor.clone() for new in names}
        else:
            found |= SplitGroups().convert({name: tensor}, [name], names, config=config)
    return found


def _renamed(name: str) -> str:
    return _WORD.sub(lambda match: _WORDS[match[1]], name)


@contextlib.contextmanager
def fitting_encoder_adapter(folder: Path) -> Iterator[Path]:
    """`folder`, or a copy with current names: encoders used to have a level ``vision_model``."""
    file = adapter_file(folder)
    if file is None or not any(".vision_model." in name for name in names_of(file)):
        yield folder
        return

    def renew(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
        # Targets may contain the old level.
        text = json.dumps(config).replace("vision_model.", "")
        renamed = {name.replace(".vision_model.", ".", 1): t for name, t in tensors.items()}
        return json.loads(text), renamed

    with _copy(folder, file, renew) as copied:
        yield copied


@contextlib.contextmanager
def _copy(
    folder: Path, file: Path, renew: Callable[[Config, Tensors], tuple[Config, Tensors]]
) -> Iterator[Path]:
    text = (folder / "adapter_config.json").read_text(encoding="utf-8")
    config, tensors = renew(json.loads(text), tensors_of(file))
    with tempfile.TemporaryDirectory() as name:
        copied = Path(name)
        save_file(tensors, str(copied / ADAPTER_FILES[0]), metadata={"format": "pt"})
        (copied / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        yield copied
