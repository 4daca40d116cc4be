"""A run that is killed repeatedly, also while saving, gives the results of an uninterrupted run."""

import random
import signal
import subprocess
import sys
import time

import pytest
from test_resume import losses, prepare, run_cli

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def start(folder, *arguments):
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", "--work-dir", "w"]
    quiet = subprocess.DEVNULL
    every_step = ["--set", "save_steps=1", "--set", "custom_hooks=[]"]
    return subprocess.Popen(
        [*command, *every_step, *arguments], cwd=folder, stdout=quiet, stderr=quiet
    )


def steps(work_dir):
    """How many steps all starts have logged."""
    return sum(len(file.read_bytes().splitlines()) for file in work_dir.glob("*/scalars.jsonl"))


def test_a_dozen_kills(tmp_path, tiny_model_path):
    straight = prepare(tmp_path / "straight", tiny_model_path, "lora", dies=False).parent
    assert run_cli(straight, "--set", "save_steps=1").returncode == 0
    folder = prepare(tmp_path / "killed", tiny_model_path, "lora", dies=False).parent
    work_dir, moments, kills = folder / "w", random.Random(0), 0
    while kills < 12:
        saved = (work_dir / "last_checkpoint").exists()
        before = steps(work_dir)
        child = start(folder, *(["--resume"] if saved else ["--overwrite"]))
        further = moments.randint(1, 2)
        try:
            while steps(work_dir) < before + further and child.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0.0, 0.1))
        finally:
            child.kill()
        if child.wait() != -signal.SIGKILL:
            break  # it finished between two kills
        kills += 1
    assert kills >= 3
    finished = run_cli(folder, "--set", "save_steps=1", "--resume")
    assert finished.returncode == 0, finished.stderr
    assert losses(work_dir) == losses(straight / "w")
    assert not [p for p in work_dir.glob(".iter_*") if p.name.endswith(".writing")]
