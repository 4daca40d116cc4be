"""Ask the held-out questions after each stage, print the accuracy, and draw a grid of answers.

    python evaluate.py quickstart-llava

`test.json` has digits that were used neither for training nor for the vision tower. An answer is
correct if it is exactly the expected word. The baseline is the final model without an image.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from xtuner.chat.opening import open_chat
from xtuner.chat.session import Session
from xtuner.generation.generate import GenerationOptions

KINDS = ("count", "digit", "colour")
Row = dict[str, Any]


def ask(session: Session, rows: list[Row], images: Path, *, image_model: bool) -> list[str]:
    """One answer per row, each in a separate conversation."""
    answers = []
    for row in rows:
        session.reset()
        shown = [str(images / row["image"])] if image_model else []
        answers.append("".join(session.ask(row["question"], shown)).strip())
    return answers


def right(row: Row, answer: str) -> bool:
    """Whether `answer` is the expected word, whatever its case and full stop."""
    return answer.strip(" .\n").lower() == row["answer"].strip(" .").lower()


def is_caption(answer: str) -> bool:
    """Whether `answer` is a caption like those of the first stage."""
    return answer.startswith("A ") and any(place in answer for place in ("left", "right", "middle"))


def table_row(name: str, rows: list[Row], answers: list[str]) -> tuple[str, float]:
    """A line for the terminal, and the share of right answers."""
    found: dict[str, list[bool]] = defaultdict(list)
    for row, answer in zip(rows, answers, strict=True):
        found[row["kind"]].append(right(row, answer))
    shares = [f"{sum(found[kind]) / max(1, len(found[kind])):>8.1%}" for kind in KINDS]
    overall = sum(map(sum, found.values())) / len(rows)
    captions = sum(map(is_caption, answers)) / len(rows)
    return f"{name:<34}{''.join(shares)}{overall:>9.1%}{captions:>10.1%}{len(rows):>8}", overall


def draw_grid(rows: list[Row], answers: list[str], images: Path, file: Path) -> None:
    """Draw twelve images with question and answer; wrong ones are red."""
    chosen = random.Random(0).sample(range(len(rows)), min(12, len(rows)))
    figure, axes = plt.subplots(3, 4, figsize=(12, 10), layout="constrained")
    for axis, index in zip(axes.flat, chosen, strict=False):
        row, answer = rows[index], answers[index]
        axis.imshow(Image.open(images / row["image"]))
        axis.axis("off")
        good = right(row, answer)
        title = f"{row['question']}\n{answer}" + ("" if good else f"  (it is: {row['answer']})")
        axis.set_title(title, fontsize=10, color="black" if good else "firebrick")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llm", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--quick", type=int, default=40, help="questions for the earlier stages")
    options = parser.parse_args()
    folder = options.folder
    rows: list[Row] = json.loads((folder / "test.json").read_text(encoding="utf-8"))
    images = folder / "images"
    half = len(rows) // 2
    stages = (
        ("before: the language model alone", options.llm, rows[: options.quick], False),
        ("after pretraining", folder / "pretrain", rows[: options.quick], True),
        ("after fine-tuning, no image", folder / "finetune", rows[:half], False),
        ("after fine-tuning", folder / "finetune", rows, True),
    )
    heads = "".join(f"{kind:>8}" for kind in KINDS)
    print(f"{'':<34}{heads}{'overall':>9}{'captions':>10}{'asked':>8}")
    results, answers = {}, []
    for name, place, asked, image_model in stages:
        how = GenerationOptions(max_new_tokens=20, temperature=0)
        session = open_chat(str(place), options=how, prompt_template="chatml", system="")
        answers = ask(session, asked, images, image_model=image_model)
        line, results[name] = table_row(name, asked, answers)
        print(line, flush=True)
    draw_grid(rows, answers, images, folder / "answers.png")
    (folder / "accuracy.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(f"\nImages with questions and answers: {folder / 'answers.png'}")


if __name__ == "__main__":
    main()
