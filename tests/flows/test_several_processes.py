"""`xtuner train --nproc 2`: the same losses as one process, and the exit codes of one process."""

import os
import socket
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
    assert two.stdout.count("Results") == 1  # only the main process prints
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
    """The others are in a collective sum, so none can save: they must not wait forever."""
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


HANGS = """
import os, time
from xtuner.algorithms.sft import Algorithm

class Hangs(Algorithm):
    calls = 0

    def loss(self, model, batch):
        self.calls += model.training
        if self.calls > 5 and os.environ.get("RANK") == "1":
            print("the last words", flush=True)
            time.sleep(600)
        return super().loss(model, batch)
"""


@pytest.mark.parametrize("strategy", ["replicated", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_process_that_hangs_ends_all_and_says_where(strategy, tmp_path, tiny_model_path):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    (folder / "hangs.py").write_text(HANGS, encoding="utf-8")
    ended = train(
        folder,
        *("--work-dir", "w", "--nproc", "2", "--set", "algorithm=hangs.py:Hangs"),
        *("--set", "accumulative_counts=1", "--set", "hang_timeout=8"),
        *("--strategy", strategy),
    )
    assert ended.returncode == 1, ended.stderr
    assert "The run hangs at process 1" in ended.stderr
    assert "Process 1 failed with exit code 1" in ended.stderr
    assert "the last words" in ended.stderr and "hangs.py" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_two_nodes_with_different_work_dirs_are_refused(tmp_path, tiny_model_path):
    folder = prepare(tmp_path / "run", tiny_model_path, "lora", dies=False).parent
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", "--nnodes", "2"]
    command += ["--nproc", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", name, "--work-dir", name],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in "01"
    ]
    said = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    assert "node 1 of 2 does not see the folder" in said[0]
    assert not any("Traceback" in text for text in said)
