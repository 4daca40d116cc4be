"""Does the default recipe learn? Train on made-up facts and ask the training questions.

    python benchmarks/recipe.py [--rows 30 100 1000] [--languages en zh] [--model DIR]
                                [--set NAME=VALUE ...] [--json FILE]

For each data set: optimizer steps, tokens, seconds, the loss at the start and end, the loss of a
model that knows the sentences but none of the facts in them, the share of (at most 40) training
questions whose answer is reproduced word for word, and of everyday questions that the model still
answers correctly. `--set` replaces settings of the recipe, to compare it with others.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from recipe_data import EVERYDAY, rows, unknown

ASKED = 40
COLUMNS = (
    *("rows", "language", "steps", "epochs", "tokens", "seconds", "first_loss", "last_loss"),
    *("no_facts", "reproduced", "near", "everyday"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[30, 100, 1000])
    parser.add_argument("--languages", nargs="+", default=["en", "zh"])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    changes = dict(_setting(text) for text in options.set)
    template = changes.get("prompt_template")  # a base model has none of its own
    before = everyday_right(options.model, template)
    known = {question for question, right in before.items() if right}
    print(f"{len(known)} of {len(EVERYDAY)} everyday answers are right before training")
    print(*COLUMNS)
    for number in options.rows:
        for language in options.languages:
            found = measure(options.model, language, number, changes, known)
            print(*found.values(), flush=True)
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**found, "set": changes}) + "\n")


def _setting(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def measure(
    model: str, language: str, number: int, changes: dict[str, Any], known: set[str]
) -> dict[str, Any]:
    """Train on `number` rows and ask; `known`: everyday questions that the model answers."""
    import xtuner

    data = list(rows(language, number))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in data]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {
            "pretrained_model_name_or_path": model,
            "tuning": "lora",
            "data_path": str(file),
            "save_total_limit": 1,
            **changes,
        }
        started = time.perf_counter()
        result = xtuner.train(settings, work_dir=Path(folder) / "run")
        seconds = time.perf_counter() - started
        log = [
            json.loads(line)
            for path in result.work_dir.glob("*/scalars.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        steps = [line for line in log if "loss" in line]
        asked = data[:: max(1, number // ASKED)][:ASKED]
        answers = ask(result.work_dir, [row["question"] for row in asked])
        kept = everyday_right(result.work_dir)
    right = [_plain(a) == _plain(row["answer"]) for a, row in zip(answers, asked, strict=False)]
    near = [_near(a, row["answer"]) for a, row in zip(answers, asked, strict=False)]
    supervised = sum(step["supervised_tokens"] for step in steps)
    return {
        "rows": number,
        "language": language,
        "steps": result.step,
        "epochs": round(steps[-1]["epoch"], 1),
        "tokens": round(sum(s["tokens_per_second"] * s["seconds"] for s in steps)),
        "seconds": round(seconds),
        "first_loss": round(steps[0]["loss"], 2),
        "last_loss": round(steps[-1]["loss"], 3),
        "no_facts": round(unknown(language, number) * steps[-1]["epoch"] / supervised, 3),
        "reproduced": round(sum(right) / len(right), 2),
        "near": round(sum(near) / len(near), 2),
        "everyday": f"{sum(kept[question] for question in known)}/{len(known)}",
    }


def everyday_right(model: Path | str, prompt_template: str | None = None) -> dict[str, bool]:
    """Which everyday questions `model` answers correctly."""
    answers = ask(model, list(EVERYDAY), prompt_template)
    return {
        question: re.search(rf"\b({pattern})\b", answer.lower()) is not None
        for (question, pattern), answer in zip(EVERYDAY.items(), answers, strict=True)
    }


def ask(model: Path | str, questions: list[str], prompt_template: str | None = None) -> list[str]:
    """Greedy answers, in one batch."""
    from xtuner.chat.opening import open_chat
    from xtuner.generation.batch import generate_batch
    from xtuner.generation.generate import GenerationOptions
    from xtuner.types import Message

    session = open_chat(str(model), prompt_template=prompt_template)
    return generate_batch(
        session.model,
        session.tokenizer,
        template=session.template,
        conversations=[[Message("user", question)] for question in questions],
        options=GenerationOptions(max_new_tokens=60),
    )


def _plain(text: str) -> str:
    return " ".join(text.split()).strip()


def _near(answer: str, wanted: str) -> float:
    """Share of equal characters."""
    import difflib

    return difflib.SequenceMatcher(None, _plain(answer), _plain(wanted)).ratio()


if __name__ == "__main__":
    main()
