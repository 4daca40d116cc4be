"""A small LLaVA with real head sizes for the checks, and the settings of both stages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpucheck.bench import Bench
from gpucheck.shapes import HEADS, small_model
from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.config.schema import Settings
from xtuner.data.build import build
from xtuner.models.load import load_tokenizer
from xtuner.models.prepare import make_trainable
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower_folder
from xtuner.training.vision import RunVision
from xtuner.types import Batch

STAGES: dict[str, dict[str, Any]] = {
    "stage 1: projector": {"tuning": "full", "freeze_llm": True},
    "stage 2: LoRA on both": {"tuning": "lora", "lora_r": 16, "visual_encoder_lora_r": 8},
}


def small_llava(bench: Bench) -> Path:
    """Write an encoder, images and rows; return their folder."""
    base_dir = bench.folder / "small" / "llava"
    if not (base_dir / "data.json").exists():
        base_dir.mkdir(parents=True, exist_ok=True)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
        tiny_vision_tower_folder(base_dir / "clip", **sizes, image_size=56, initializer_range=0.05)
        tiny_llava_data(base_dir / "data.json", base_dir / "images", count=6)
        model = small_model(bench.folder, next(iter(HEADS)), tiny=bench.tiny)
        (base_dir / "model.json").write_text(json.dumps(str(model)))
    return base_dir


def built(
    base_dir: Path, changes: Mapping[str, Any], device: str, dtype: torch.dtype
) -> tuple[Any, Batch]:
    """The model as a run creates it, and its first rows."""
    s = Settings(
        pretrained_model_name_or_path=json.loads((base_dir / "model.json").read_text()),
        visual_encoder_name_or_path=str(base_dir / "clip"),
        data_path=str(base_dir / "data.json"),
        image_folder=str(base_dir / "images"),
        prompt_template="chatml",
        max_length=96,
        lora_dropout=0.0,
        **changes,
    )
    tokenizer = load_tokenizer(s.pretrained_model_name_or_path)
    vision = RunVision.of(s, tokenizer, folder=base_dir)
    algorithm = Algorithm(s)
    template = templates.of_run(s, tokenizer, algorithm=algorithm, folder=base_dir)
    data = build(
        s,
        template=template,
        tokenizer=tokenizer,
        folder=base_dir,
        algorithm=algorithm,
        quiet=True,
        image_layout=vision.image_layout,
    )
    samples = [sample for index in range(4) for sample in data.train[index]]
    batch = vision.collate(algorithm)(samples)
    llm = make_trainable(s, dtype=dtype, device=device, recompute=False)
    model = vision.join(llm, dtype=dtype, device=device, source=None)
    return model, batch
