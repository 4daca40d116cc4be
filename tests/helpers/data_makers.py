"""Helpers for tests of the data pipeline."""

import hashlib
import json
from functools import cache
from pathlib import Path

from xtuner import algorithms, templates
from xtuner.config.schema import Settings
from xtuner.data.build import build
from xtuner.testing.tiny import tiny_tokenizer


@cache
def tokenizer():
    return tiny_tokenizer()


@cache
def template():
    return templates.load("auto", tokenizer())


def chat(question, answer):
    """A row of format openai."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def chats(count, *, longest=120):
    """Rows that are all different, of many lengths."""
    sizes = [
        5 + int(hashlib.sha256(str(i).encode()).hexdigest(), 16) % longest for i in range(count)
    ]
    return [chat(f"question {i}", "x" * size) for i, size in enumerate(sizes)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def settings(*paths, **changes):
    return Settings(
        pretrained_model_name_or_path="unused", data_path=tuple(map(str, paths)), **changes
    )


def build_data(
    *paths, folder=Path("/"), report_dir=None, own_template=None, image_layout=None, **changes
):
    """Build from `paths` with the tiny tokenizer and its ChatML template."""
    chosen = settings(*paths, **changes)
    return build(
        chosen,
        template=own_template or template(),
        tokenizer=tokenizer(),
        folder=folder,
        report_dir=report_dir,
        quiet=True,
        algorithm=algorithms.of_run(chosen, folder=folder),
        image_layout=image_layout,
    )


def lines_of(dataset):
    """The line of every sample, in the order of the packs."""
    return [sample.row.line for i in range(len(dataset)) for sample in dataset[i]]


def text_of(sample):
    return tokenizer().decode(sample.input_ids)
