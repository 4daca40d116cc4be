"""Complete runs of `xtuner train` and what follows: resuming, chat, merging, marked tests."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gpucheck.bench import Bench, Trained
from gpucheck.correct import guarded
from gpucheck.rows import Row, Skip, within
from gpucheck.shapes import HEADS, small_model

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
RESUMED: dict[str, dict[str, Any]] = {
    "LoRA": {"tuning": "lora", "optim_type": "AdamW"},
    # bitsandbytes pages the state of matrices of 100,000 numbers or more: 256 x 512
    "QLoRA, paged state": {
        "tuning": "qlora",
        "lora_r": 256,
        "optim_type": "PagedAdamW32bit",
        "gradient_checkpointing": True,
    },
    "all weights, 8-bit paged state": {"tuning": "full", "optim_type": "PagedAdamW8bit"},
}
SMALL = {
    "max_length": 256,
    "lora_r": 16,
    "lr": 1e-3,
    "max_epochs": 50,
    "logging_steps": 1,
    "prompt_template": "chatml",
    "evaluation_inputs": (),
}
NOISE = 1e-3
"""Allowed relative difference of the loss between an uninterrupted and a resumed run, if two
uninterrupted runs also differ: gradients of flash attention are not deterministic. Otherwise they
must be bitwise equal."""


def _data(bench: Bench) -> Path:
    file = bench.folder / "counting.json"
    rows = [
        {"instruction": f"What comes after {n}?", "input": "", "output": f"{n + 1} it is. " * 3}
        for n in range(40)
    ]
    bench.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    return file


def resume(bench: Bench) -> Iterator[Row]:
    """Compare a stopped and resumed run with two uninterrupted ones."""
    for name, changes in RESUMED.items():
        yield from guarded(name, _resumed, bench, changes)


def _resumed(name: str, bench: Bench, changes: Mapping[str, Any]) -> Iterator[Row]:
    model = small_model(bench.folder, next(iter(HEADS)), tiny=bench.tiny)
    data, label = _data(bench), name.replace(" ", "-").replace(",", "")

    def run(base_dir: str, steps: int, *arguments: str) -> Trained:
        values = {**SMALL, **changes, "max_steps": steps, "save_steps": STEPS // 2}
        return bench.train(
            f"{label}-{base_dir}", values, *arguments, model=model, data=data
        ).check()

    straight, again = (_losses(run(base_dir, STEPS)) for base_dir in ("straight", "again"))
    run("stopped", STEPS // 2)
    resumed = run("stopped", STEPS, "--resume")
    losses = _losses(resumed)
    expected = straight[STEPS - len(losses) :]
    noise = _apart(straight, again)
    allowed = 0.0 if noise == 0 else max(NOISE, 2 * noise)
    said = resumed.line("Computing")
    yield within(
        f"{name}: losses of {len(losses)} resumed steps",
        _apart(losses, expected) if len(losses) == STEPS // 2 else float("nan"),
        allowed,
        two_straight_runs=noise,
    )
    learnt = straight[-1] < straight[0]
    yield Row(f"{name}: it learns", {"found": f"{straight[0]:.3f} to {straight[-1]:.3f}"}, learnt)
    yield Row(f"{name}: computing", {"found": said or "not said"})


def _losses(run: Trained) -> list[float]:
    return [float(step["loss"]) for step in run.steps if "loss" in step]


def _apart(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


SENTENCE = "I am Ada, a small model on a card."


def answers(bench: Bench) -> Iterator[Row]:
    """Train one sentence, ask for it in a chat, merge the model, and ask again."""
    yield from guarded("a taught sentence", _taught, bench)


def _taught(name: str, bench: Bench) -> Iterator[Row]:
    model = small_model(bench.folder, next(iter(HEADS)), tiny=bench.tiny)
    data = bench.folder / "sentence.json"
    data.write_text(
        json.dumps([{"instruction": "Who are you?", "input": "", "output": SENTENCE}] * 8)
    )
    values = {**SMALL, "tuning": "lora", "lora_alpha": 32, "lr": 5e-3, "max_steps": 40}
    run = bench.train("taught", values, model=model, data=data).check()
    losses = _losses(run)
    yield within(f"{name}: last loss", losses[-1], losses[0] / 4, first=losses[0])
    said = _ask(bench, str(run.work))
    yield Row(f"{name}: chat with the adapter", {"found": said}, passed=said == SENTENCE)
    merged = bench.folder / "runs" / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    yield from _merged(name, bench, model, run.work, merged)
    said = _ask(bench, str(merged))
    yield Row(f"{name}: chat with the merged model", {"found": said}, passed=said == SENTENCE)


def _ask(bench: Bench, model: str) -> str:
    from xtuner.cli.app import main

    text = io.StringIO()
    arguments = ["chat", model, "--device", bench.device, "--ask", "Who are you?"]
    arguments += ["--max-new-tokens", "60", "--prompt-template", "chatml"]
    with contextlib.redirect_stdout(text):
        code = main(arguments)
    if code:
        raise RuntimeError(f"xtuner chat: exit code {code}")
    return text.getvalue().strip()


def _merged(name: str, bench: Bench, model: Path, work: Path, merged: Path) -> Iterator[Row]:
    from xtuner.convert.merge import merge

    device: Any = bench.device
    report = merge(model, work, merged, device=device, log=lambda line: None)
    # The sum of weight and adapter is rounded once more, in bfloat16.
    bound = 8 * torch.finfo(torch.bfloat16).eps
    found = float("nan") if report.relative is None else report.relative
    yield within(f"{name}: logits, merged - apart", found, bound)


def marked_tests(bench: Bench) -> Iterator[Row]:
    """Run `pytest -m gpu` in a separate process."""
    if bench.device == "cpu":
        raise Skip("the tests marked gpu need a GPU, or --fake")
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    bench.free()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    command += ["-q", "--tb=line", "-o", "addopts=--strict-markers"]
    environment = dict(os.environ)
    if bench.options.fake:
        environment["XTUNER_FAKE_CUDA"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-6000:], done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield Row(line[:300], {"found": "failed"}, passed=False)
    last = (lines or [done.stderr[-200:] or "said nothing"])[-1].strip("= ")
    yield Row("pytest -m gpu", {"found": last}, passed=done.returncode == 0)
