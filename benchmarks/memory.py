"""Compare the forecast of peak memory with the measured peak for fourteen settings.

    python benchmarks/memory.py [--data ROWS.json] [--model DIR] [--steps 5] [--case TEXT]
    python benchmarks/memory.py --gpu     the same on a GPU, with models of 1.8B and 7B parameters

The measured value is the peak RSS of `xtuner train`. On a GPU it is the peak reserved by torch;
without a GPU it is the peak of all tensors on the fake CUDA device
(`xtuner.testing.fake_cuda.device`), which the forecast should exceed by 5 %, its allowance for
fragmentation. A 7B model takes 15 minutes there and 20 GB of disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gpu
import psutil
import torch
from cpu import COMMON, HOME, run_xtuner
from llava import LARGE_14_336, make_encoder, make_rows
from rows import rows
from transformers import LlamaConfig

IMAGES = {
    "visual_encoder_name_or_path": "clip",
    "data_path": "rows.json",
    "image_folder": "images",
    "max_length": 448,
    "pack_to_max_length": False,
}
"""An image of 576 tokens and up to 448 of text; folders are made by `make_images`."""
CASES: dict[str, dict] = {
    "LoRA r=64, 1,024 tokens": {},
    "LoRA r=64, 4 x 512 tokens": {"max_length": 512, "batch_size": 4},
    "LoRA r=64, 2,048 tokens": {"max_length": 2048},
    "LoRA r=64, 2 micro-batches of 1,024 tokens": {"accumulative_counts": 2},
    "LoRA r=16, 2,048 tokens, recomputed": {
        "lora_r": 16,
        "max_length": 2048,
        "gradient_checkpointing": True,
    },
    "LoRA r=64, dropout, 1,024 tokens": {"lora_dropout": 0.1},
    "LoRA r=64, 4,096 tokens": {"max_length": 4096},
    "QLoRA r=64, 1,024 tokens": {"tuning": "qlora"},
    "QLoRA r=64, 8-bit AdamW, 2,048 tokens": {
        "tuning": "qlora",
        "optim_type": "PagedAdamW8bit",
        "max_length": 2048,
    },
    "all weights, 1,024 tokens": {"tuning": "full"},
    "all weights, 2 micro-batches of 1,024 tokens": {"tuning": "full", "accumulative_counts": 2},
    "LLaVA, CLIP ViT-L/14-336: projector": {
        **IMAGES,
        "tuning": "full",
        "freeze_llm": True,
    },
    "LLaVA, CLIP ViT-L/14-336: LoRA r=64 on both": {
        **IMAGES,
        "visual_encoder_lora_r": 64,
    },
    "all weights, 2 x 1,024 tokens, recomputed": {
        "tuning": "full",
        "batch_size": 2,
        "gradient_checkpointing": True,
    },
}


def make_images(base_dir: Path, shape: dict = LARGE_14_336) -> dict[str, str]:
    """Make an encoder, images and rows in `base_dir`; return the settings that name them."""
    if not (base_dir / "images").exists():
        make_encoder(base_dir / "clip", shape)
        made = make_rows(base_dir, 12)
        for row in made:  # the forecast is for rows of `max_length`; longer ones are cut
            row["conversations"][1]["value"] = " ".join(["A longer answer."] * 150)
        (base_dir / "rows.json").write_text(json.dumps(made))
    names = ("visual_encoder_name_or_path", "data_path", "image_folder")
    return {name: str(base_dir / IMAGES[name]) for name in names}


Case = tuple[str, dict, Callable[[], object]]
"""Its name, its settings, and the function that creates its weights."""


def of_small_model(base_dir: Path, options: argparse.Namespace) -> Iterator[Case]:
    """The cases above."""
    for name, changes in CASES.items():
        if options.case in name:
            images = "visual_encoder_name_or_path" in changes
            made = make_images(base_dir / "llava") if images else {}
            yield name, {**COMMON, "tuning": "lora", **changes, **made}, lambda: None


def of_large_models(base_dir: Path, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of gpu.py, one model on disk at a time."""
    for name, case in gpu.CASES.items():
        if options.case in name:
            options.model = base_dir / name
            LlamaConfig(**case.shape).save_pretrained(options.model)
            make = functools.partial(gpu.make_model, options.model, case.shape)
            yield name, {**gpu.COMMON, **case.settings}, make
            shutil.rmtree(options.model)


def main() -> None:
    """Print the table."""
    from xtuner.config.schema import Settings
    from xtuner.memory.plan import plan_memory

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, or on the fake CUDA device")
    options = parser.parse_args()
    device = "cuda" if options.gpu else "cpu"
    fake = options.gpu and not torch.cuda.is_available()
    through = ("xtuner.testing.fake_cuda.device",) if fake else ()
    os.environ.setdefault("FAKE_CUDA_MIB", str(2**20))  # no limit
    print("| settings | forecast MiB | measured MiB | forecast / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=HOME if options.gpu and HOME.exists() else None) as folder:
        base_dir = Path(folder)
        (base_dir / "llava").mkdir()
        if options.data is None:
            options.data = base_dir / "rows.json"
            options.data.write_text(json.dumps(rows(999)))
        options.data, options.model = options.data.resolve(), options.model.resolve()
        cases = [of_small_model, of_large_models] if options.gpu else [of_small_model]
        for name, values, make in (case for some in cases for case in some(base_dir, options)):
            named = {
                "pretrained_model_name_or_path": str(options.model),
                "data_path": str(options.data),
            }
            settings, room = Settings(**{**named, **values}), 2**40 if fake else None
            expected = plan_memory(settings, device, memory=room).forecast.peak / 2**20
            print(f"| {name} | {expected:,.0f} | ", end="", flush=True)
            if fake and expected * 2**20 > 0.8 * psutil.virtual_memory().available:
                print("not enough memory | |")
                continue
            make()
            try:
                steps, peak = run_xtuner({**values, "device": device}, base_dir, options, through)
            except SystemExit as error:  # such as running out of memory
                print(f"failed: {str(error).strip().splitlines()[-1][:200]} | |")
                continue
            peak = max(step["memory_mb"] for step in steps) if options.gpu else peak
            print(f"{peak:,.0f} | {expected / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
