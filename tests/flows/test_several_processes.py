"""`xtuner train --nproc 2`: the same losses as one process, and the exit codes of one process."""

import os
import subprocess
import sys

import pytest
from test_resume import losses, prepare

from xtuner.cli.app import main

pytestmark = pytest.mark.distributed
ALIKE = ("lora_dropout=0.0", "dtype=float32")
"""Settings of all runs."""


def train(folder, *arguments, **environment):
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", *arguments]
    return subprocess.run(
        [*command, *(word for value in ALIKE for word in ("--set", value))],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_two_processes_give_the_losses_of_one(tmp_path, tiny_model_path, monkeypatch):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    monkeypatch.chdir(folder)
    alike = [word for value in ALIKE for word in ("--set", value)]
    one = main(["train", "config.py", "--work-dir", "one", "--set", "max_steps=4", *alike])
    two = train(
        folder,
        *("--work-dir", "two", "--set", "max_steps=4", "--nproc", "2"),
        *("--set", "accumulative_counts=1"),
    )
    assert (one, two.returncode) == (0, 0), two.stderr
    assert two.stdout.count("Results") == 1  # the main process alone speaks
    expected, found = losses(folder / "one"), losses(folder / "two")
    assert len(expected) == 4 and found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step][0] == pytest.approx(values[0], abs=1e-5)
        assert found[step][2] == (values[2] and pytest.approx(values[2], abs=1e-5))
    answers = [sorted((folder / name).glob("*/eval_outputs*")) for name in ("one", "two")]
    assert len(answers[0]) == 2  # before and after
    for alone, shared in zip(*answers, strict=True):
        assert shared.read_text() == alone.read_text()


def test_user_error_exits_with_2_and_one_message(tmp_path, tiny_model_path):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    failed = train(folder, "--nproc=2", "--set", "data_path=missing.jsonl")
    assert failed.returncode == 2
    assert failed.stderr.count("missing.jsonl") >= 1 and "Traceback" not in failed.stderr


def test_sigterm_saves_and_exits_with_130(tmp_path, tiny_model_path):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=True).parent
    stopped = train(
        folder,
        *("--work-dir", "w", "--nproc", "2", "--set", "accumulative_counts=1"),
        HOW_TO_DIE="SIGTERM",
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "--nproc 2 --resume" in stopped.stderr
    assert (folder / "w" / "last_checkpoint").read_text().strip() == "iter_7"


SHORT_OF_MEMORY = """
import os, torch
from xtuner.algorithms.sft import Algorithm

class Short(Algorithm):
    calls = 0

    def loss(self, model, batch):
        self.calls += 1
        if self.calls > 20 and os.environ.get("RANK") == "1":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(model, batch)
"""


def test_one_process_out_of_memory_ends_all_and_says_why(tmp_path, tiny_model_path):
    """The others are in the middle of a sum, so nobody can save: they must not wait a day."""
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    (folder / "short.py").write_text(SHORT_OF_MEMORY, encoding="utf-8")
    ended = train(
        folder,
        *("--work-dir", "w", "--nproc", "2", "--set", "algorithm=short.py:Short"),
        *("--set", "accumulative_counts=1", "--set", "validation_ratio=0.0"),
    )
    assert ended.returncode == 2, ended.stderr
    assert "out of memory" in ended.stderr and "another process" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (folder / "w" / "last_checkpoint").is_file()
