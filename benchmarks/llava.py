"""Images per second: xtuner compared with a plain transformers loop on the same data.

    python benchmarks/llava.py [--model DIR] [--rows 48] [--rounds 2]

A frozen CLIP ViT-B/16 with random weights (196 tokens per image), a trained projector, and a
language model with LoRA r=64. The plain loop uses transformers' LLaVA and its processor, padded
batches of four and peft, in bfloat16. xtuner is `xtuner train`, without the feature cache and with
it in the second epoch (`cache_visual_features`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cpu import HOME, run_xtuner
from PIL import Image
from rows import rows

BATCH = 4
WARM = 2


BASE_16 = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
           "num_attention_heads": 12, "image_size": 224, "patch_size": 16}  # fmt: skip
LARGE_14_336 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip


def make_encoder(folder: Path, shape: dict) -> None:
    """Write a CLIP vision encoder with random weights and its processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    side = shape["image_size"]
    CLIPVisionModel(CLIPVisionConfig(**shape)).to(torch.bfloat16).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(folder)


def make_rows(folder: Path, count: int) -> list[dict]:
    """Write images of noise and rows of one question and answer about each."""
    (folder / "images").mkdir()
    draw, made = random.Random(0), []
    for number, row in enumerate(rows(count)):
        noise = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        size = draw.randint(200, 400), draw.randint(200, 400)
        Image.fromarray(noise).resize(size).save(folder / f"images/{number}.png")
        turns = [("human", f"<image>\n{row['instruction']}"), ("gpt", row["output"])]
        talk = [{"from": who, "value": text} for who, text in turns]
        made.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "rows.json").write_text(json.dumps(made))
    return made


def plain(options: argparse.Namespace, folder: Path, made: list[dict]) -> list[float]:
    """Images per second of every step of a loop as in transformers' documentation."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        CLIPImageProcessorPil,
        CLIPVisionModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    llm = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    llm.resize_token_embeddings(len(tokenizer))
    tower = CLIPVisionModel.from_pretrained(folder / "clip", dtype=torch.bfloat16)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=tower.config, text_config=llm.config, image_token_id=image_token
    )
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    processor = LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder / "clip"),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    lora = LoraConfig(
        r=64,
        lora_alpha=16,
        target_modules=r".*language_model.*(q|k|v|o|gate|up|down)_proj",
        modules_to_save=["multi_modal_projector"],
    )
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
    rates = []
    for first in range(0, len(made), BATCH):
        part = made[first : first + BATCH]
        began = time.perf_counter()
        texts = []
        for row in part:
            asked, answer = (turn["value"] for turn in row["conversations"])
            talk = [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
            texts.append(tokenizer.apply_chat_template(talk, tokenize=False))
        images = [Image.open(folder / "images" / row["image"]).convert("RGB") for row in part]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels = labels.masked_fill(labels == image_token, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(len(part) / (time.perf_counter() - began))
    return rates


def ours(options: argparse.Namespace, folder: Path, cached: bool) -> list[float]:
    """Images per second of every step of `xtuner train`; cached: of its second epoch."""
    steps_an_epoch = -(-options.rows // BATCH)
    options.data, options.steps = folder / "rows.json", steps_an_epoch * (2 if cached else 1)
    settings = {
        "visual_encoder_name_or_path": str(folder / "clip"),
        "image_folder": str(folder / "images"),
        "tuning": "lora",
        "pack_to_max_length": False,
        "batch_size": BATCH,
        "max_length": 1024,
        "max_epochs": 2 if cached else 1,
        "cache_visual_features": cached,
    }
    steps, _ = run_xtuner(settings, folder, options)
    rates = [BATCH / step["seconds"] for step in steps]
    return rates[steps_an_epoch:] if cached else rates


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HOME / "models/smollm2_135m_instruct")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    options.model = options.model.resolve()
    found: dict[str, list[float]] = {"plain": [], "xtuner": [], "xtuner, cached features": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_encoder(folder / "clip", BASE_16)
        made = make_rows(folder, options.rows)
        for _ in range(options.rounds):
            found["plain"] += plain(options, folder, made)[WARM:]
            found["xtuner"] += ours(options, folder, cached=False)[WARM:]
            found["xtuner, cached features"] += ours(options, folder, cached=True)[WARM:]
    base = statistics.median(found["plain"])
    print("| program | images/s | relative to the plain loop |\n|---|---|---|")
    for who, rates in found.items():
        rate = statistics.median(rates)
        print(f"| {who} | {rate:.2f} | {rate / base:.2f} |")


if __name__ == "__main__":
    main()
