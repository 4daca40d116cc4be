"""Forecast of the peak memory beside what the real run took, for twelve settings.

    python benchmarks/memory.py [--data ROWS.json] [--model DIR] [--steps 5]

The measured figure is the highest resident memory of `xtuner train` as the system counts it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from cpu import COMMON, HOME, run_xtuner
from llava import LARGE_14_336, make_encoder, make_rows
from rows import rows

PICTURES = {
    "visual_encoder_name_or_path": "clip",
    "data_path": "rows.json",
    "image_folder": "images",
    "max_length": 448,
    "pack_to_max_length": False,
}
"""A picture of 576 tokens and up to 448 of text; folders are made by `make_pictures`."""
CASES: dict[str, dict] = {
    "LoRA r=64, 1,024 tokens": {},
    "LoRA r=64, 4 x 512 tokens": {"max_length": 512, "batch_size": 4},
    "LoRA r=64, 2,048 tokens": {"max_length": 2048},
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
    "LLaVA, CLIP ViT-L/14-336: projector": {
        **PICTURES,
        "tuning": "full",
        "freeze_llm": True,
    },
    "LLaVA, CLIP ViT-L/14-336: LoRA r=64 on both": {
        **PICTURES,
        "visual_encoder_lora_r": 64,
    },
    "all weights, 2 x 1,024 tokens, recomputed": {
        "tuning": "full",
        "batch_size": 2,
        "gradient_checkpointing": True,
    },
}


def make_pictures(place: Path) -> dict[str, str]:
    """Make an encoder, pictures and rows in `place`; return the settings that name them."""
    if not (place / "images").exists():
        make_encoder(place / "clip", LARGE_14_336)
        made = make_rows(place, 12)
        for row in made:  # the forecast is for rows of `max_length`; longer ones are cut
            row["conversations"][1]["value"] = " ".join(["A longer answer."] * 150)
        (place / "rows.json").write_text(json.dumps(made))
    names = ("visual_encoder_name_or_path", "data_path", "image_folder")
    return {name: str(place / PICTURES[name]) for name in names}


def main() -> None:
    """Print the table."""
    from xtuner.config.schema import Settings
    from xtuner.engine.forecast import forecast

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--case", help="only the cases with this text in their name")
    options = parser.parse_args()
    print("| settings | forecast MiB | measured MiB | forecast / measured |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "llava").mkdir()
        if options.data is None:
            options.data = place / "rows.json"
            options.data.write_text(json.dumps(rows(999)))
        options.data, options.model = options.data.resolve(), options.model.resolve()
        for name, changes in CASES.items():
            if options.case and options.case not in name:
                continue
            named = {
                "pretrained_model_name_or_path": str(options.model),
                "data_path": str(options.data),
            }
            if "visual_encoder_name_or_path" in changes:
                named |= make_pictures(place / "llava")
            values = {**COMMON, "tuning": "lora", **changes, **named}
            settings = Settings(**values)
            expected = forecast(
                settings, "cpu", recompute=settings.gradient_checkpointing is True
            ).peak
            _, peak = run_xtuner(values, place, options)
            expected /= 2**20
            print(f"| {name} | {expected:,.0f} | {peak:,.0f} | {expected / peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
