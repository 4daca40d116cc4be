"""Images of one to three handwritten digits in colours, their captions and questions about them.

    python make_data.py --out quickstart-llava

The digits are the 1,797 handwritten digits of scikit-learn. A quarter of them is held out, from the
training of the model and of the vision tower.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 48
SIZES = (12, 13, 14)
COLOURS = {
    "red": (255, 60, 50),
    "green": (50, 230, 60),
    "blue": (80, 110, 255),
    "yellow": (250, 240, 60),
}
PLACES = {1: ("in the middle",), 2: ("on the left", "on the right"),
          3: ("on the left", "in the middle", "on the right")}  # fmt: skip
CENTRES = {"on the left": 8, "in the middle": 24, "on the right": 40}
NUMBERS = ("no", "one", "two", "three")
REQUESTS = ("", "", "Describe the image.", "What do you see?", "What is in the image?")
"""What a caption answers; mostly nothing, so that the image alone calls for it."""
Scene = list[tuple[int, str, str]]
"""(digit, colour, place) of each digit from left to right."""


def digits(held_out: bool) -> dict[int, list[list[np.ndarray]]]:
    """Images from 0 to 1 by digit, of the training or of the held-out part, in all `SIZES`."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    chosen = order[: len(order) // 4] if held_out else order[len(order) // 4 :]
    found: dict[int, list[list[np.ndarray]]] = {d: [] for d in range(10)}
    for image, digit in zip(data.images[chosen], data.target[chosen], strict=True):
        drawn = Image.fromarray((image * 255 / 16).astype(np.uint8))
        sized = [drawn.resize((size, size), Image.Resampling.BICUBIC) for size in SIZES]
        found[int(digit)].append([np.asarray(x, dtype=np.float32)[..., None] / 255 for x in sized])
    return found


def draw_scene(rng: random.Random) -> Scene:
    """Choose what is on an image; its digits differ, so that a digit names one of them."""
    places = PLACES[rng.choice((1, 2, 3))]
    chosen = rng.sample(range(10), len(places))
    return [(d, rng.choice(list(COLOURS)), place) for d, place in zip(chosen, places, strict=True)]


def draw_image(scene: Scene, images: dict[int, Any], rng: random.Random) -> np.ndarray:
    """Draw a scene ``[SIDE, SIDE, 3]`` with a sample of every digit, slightly moved and scaled."""
    canvas = np.full((SIDE, SIDE, 3), rng.randint(0, 40), dtype=np.float32)
    for digit, colour, place in scene:
        alpha = rng.choice(rng.choice(images[digit]))
        size = len(alpha)
        left = CENTRES[place] - size // 2 + rng.randint(-1, 1)
        top = SIDE // 2 - size // 2 + rng.randint(-1, 1)
        part = canvas[top : top + size, left : left + size]
        part[:] = part * (1 - alpha) + np.array(COLOURS[colour], dtype=np.float32) * alpha
    return canvas.clip(0, 255).astype(np.uint8)


def caption(scene: Scene) -> str:
    """One sentence about a scene."""
    parts = [f"a {colour} {digit} {place}" for digit, colour, place in scene]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def questions(scene: Scene, rng: random.Random) -> list[tuple[str, str, str]]:
    """(kind, question, answer): how many, which digit is where, what colour it is."""
    found = [("count", "How many digits are there?", f"{NUMBERS[len(scene)].capitalize()}.")]
    for digit, colour, place in scene:
        found.append(("digit", f"Which digit is {place}?", f"{digit}."))
        asked = rng.choice((f"What colour is the {digit}?", f"What colour is the digit {place}?"))
        found.append(("colour", asked, f"{colour.capitalize()}."))
    rng.shuffle(found)
    return found


def turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation in LLaVA's form; the image precedes the first question."""
    rows = []
    for number, (question, answer) in enumerate(pairs):
        rows.append({"from": "human", "value": ("" if number else "<image>\n") + question})
        rows.append({"from": "gpt", "value": answer})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("quickstart-llava"))
    parser.add_argument("--pretrain", type=int, default=2000)
    parser.add_argument("--finetune", type=int, default=1200)
    parser.add_argument("--test", type=int, default=200)
    options = parser.parse_args()
    folder = options.out / "images"
    folder.mkdir(parents=True, exist_ok=True)

    def make(part: str, count: int, held_out: bool) -> list[tuple[str, Scene, random.Random]]:
        images, made = digits(held_out), []
        for number in range(count):
            rng = random.Random(f"{part} {number}")
            scene = draw_scene(rng)
            name = f"{part}_{number:05d}.png"
            Image.fromarray(draw_image(scene, images, rng)).save(folder / name)
            made.append((name, scene, rng))
        return made

    pretrain = [
        {"id": name, "image": name, "conversations": turns([(rng.choice(REQUESTS), caption(s))])}
        for name, s, rng in make("pretrain", options.pretrain, held_out=False)
    ]
    finetune = [
        {
            "id": name,
            "image": name,
            "conversations": turns([qa[1:] for qa in questions(s, rng)[:5]]),
        }
        for name, s, rng in make("finetune", options.finetune, held_out=False)
    ]
    test = [
        {"image": name, "kind": kind, "question": question, "answer": answer, "caption": caption(s)}
        for name, s, rng in make("test", options.test, held_out=True)
        for kind, question, answer in questions(s, rng)[:1]
    ]
    for name, rows in (("pretrain", pretrain), ("finetune", finetune), ("test", test)):
        (options.out / f"{name}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(f"{name}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
