"""LLaVA for the checks: a small one with heads of real sizes, and settings of both stages."""

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
    place = bench.folder / "small" / "llava"
    if not (place / "data.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
        tiny_vision_tower_folder(place / "clip", **sizes, image_size=56, initializer_range=0.05)
        tiny_llava_data(place / "data.json", place / "images", count=6)
        model = small_model(bench.folder, next(iter(HEADS)), tiny=bench.tiny)
        (place / "model.json").write_text(json.dumps(str(model)))
    return place


def built(
    place: Path, changes: Mapping[str, Any], device: str, dtype: torch.dtype
) -> tuple[Any, Batch]:
    """The model as a run makes it, and its first rows."""
    s = Settings(
        pretrained_model_name_or_path=json.loads((place / "model.json").read_text()),
        visual_encoder_name_or_path=str(place / "clip"),
        data_path=str(place / "data.json"),
        image_folder=str(place / "images"),
        prompt_template="chatml",
        max_length=96,
        lora_dropout=0.0,
        **changes,
    )
    tokenizer = load_tokenizer(s.pretrained_model_name_or_path)
    vision = RunVision.of(s, tokenizer, folder=place)
    algorithm = Algorithm(s)
    template = templates.of_run(s, tokenizer, algorithm=algorithm, folder=place)
    data = build(
        s,
        template=template,
        tokenizer=tokenizer,
        folder=place,
        algorithm=algorithm,
        quiet=True,
        image_layout=vision.image_layout,
    )
    samples = [sample for index in range(4) for sample in data.train[index]]
    batch = vision.collate(algorithm)(samples)
    llm = make_trainable(s, dtype=dtype, device=device, recompute=False)
    model = vision.join(llm, dtype=dtype, device=device, source=None)
    return model, batch
