"""Train a small CLIP (arXiv:2103.00020) from scratch on images of digits and their captions.

    python train_clip.py --out quickstart-llava/clip --minutes 2

Images are generated during training from the digits of the training split. Each batch is a
contrastive task between images and captions. The result is the vision tower for LLaVA.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
from make_data import (
    CENTRES,
    COLOURS,
    SIDE,
    Scene,
    caption,
    digits,
    draw_image,
    draw_scene,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

MEAN, STD = (0.2, 0.2, 0.2), (0.25, 0.25, 0.25)
WORDS = ["<pad>", "<start>", *"left middle right red green blue yellow".split(),
         *map(str, range(10)), "<end>"]  # fmt: skip
LENGTH = 11


def tokens(text: str) -> list[int]:
    """Ids of the words that distinguish captions; a text encoder needs no others."""
    words = text.lower().replace(".", "").replace(",", "").split()
    ids = [1, *(WORDS.index(word) for word in words if word in WORDS), len(WORDS) - 1]
    return ids + [0] * (LENGTH - len(ids))


def make_model() -> CLIPModel:
    shared = {"num_attention_heads": 4, "projection_dim": 128}
    vision = {**shared, "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512,
              "image_size": SIDE, "patch_size": 16}  # fmt: skip
    text = {**shared, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256,
            "vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "bos_token_id": 1,
            "eos_token_id": len(WORDS) - 1, "pad_token_id": 0}  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def draw_for_clip(rng: random.Random) -> Scene:
    """One digit anywhere, or a whole scene now and then. Captions of three digits mostly differ in
    colour, which is learned quickly; digits are only distinguished if nothing else differs."""
    if rng.random() < 0.25:
        return draw_scene(rng)
    return [(rng.randrange(10), rng.choice(list(COLOURS)), rng.choice(list(CENTRES)))]


class Batches(torch.utils.data.IterableDataset):
    """An endless stream of new images and their captions."""

    def __init__(self, size: int, held_out: bool = False) -> None:
        self.size, self.held_out = size, held_out

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = random.Random(f"clip {worker.id if worker else ''} {self.held_out}")
        images = digits(self.held_out)
        while True:
            scenes = [draw_for_clip(rng) for _ in range(self.size)]
            pixels = np.stack([draw_image(scene, images, rng) for scene in scenes])
            ids = torch.tensor([tokens(caption(scene)) for scene in scenes])
            yield torch.from_numpy(pixels), ids


def prepared(pixels: Tensor) -> Tensor:
    values = (pixels.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return values.permute(0, 3, 1, 2)


def scores(model: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    output = model(pixel_values=prepared(pixels), input_ids=ids, attention_mask=(ids > 0).long())
    return output.logits_per_image


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("quickstart-llava/clip"))
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    loader = iter(torch.utils.data.DataLoader(Batches(128), batch_size=None, num_workers=1))
    started, end = time.monotonic(), options.minutes * 60
    for step in range(options.steps):
        done = max(step / options.steps, (time.monotonic() - started) / end)
        if done >= 1:
            break
        rate = 2e-3 * min(1, (step + 1) / 50, (1 - done) / 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, ids = next(loader)
        same = (ids[:, None] == ids[None]).all(-1)  # equal captions are both correct
        targets = same / same.sum(-1, keepdim=True)
        logits = scores(model, pixels, ids)
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}  loss {loss:.3f}  {time.monotonic() - started:.0f} s", flush=True)
    with torch.no_grad():
        model.eval()
        pixels, ids = next(iter(Batches(256, held_out=True)))
        found = scores(model, pixels, ids).argmax(-1)
        right = (ids[found] == ids).all(-1).float().mean()
    print(f"Held-out digits: the right one of 256 captions for {right:.1%} of the images")
    model.save_pretrained(options.out)
    from transformers import CLIPImageProcessorPil

    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=square, image_mean=MEAN, image_std=STD
    ).save_pretrained(options.out)
    print(f"Written to {options.out}")


if __name__ == "__main__":
    main()
