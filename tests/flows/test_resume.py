"""A killed and resumed run gives the losses of an uninterrupted run bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner.cli.app import main

ROWS = [
    {"messages": [{"role": "user", "content": f"{i} " * (i % 7 + 1)},
                  {"role": "assistant", "content": f"It is {i}." * (i % 3 + 1)}]}
    for i in range(60)
]  # fmt: skip
DYING_HOOK = """
import os, signal
from xtuner.engine.hooks.base import BaseHook

class Die(BaseHook):
    order = 99  # after the logs

    def on_step(self, run):
        if run.step == 7 and run.start_step == 0:
            how = os.environ["HOW_TO_DIE"]
            if how == "error":
                raise RuntimeError("died on purpose")
            os.kill(os.getpid(), getattr(signal, how))
"""
SETTINGS = """
pretrained_model_name_or_path = {model!r}
data_path = 'rows.jsonl'
tuning = {tuning!r}
lora_r = 4
lora_dropout = 0.1
max_length = 128
accumulative_counts = 2
max_epochs = 2
lr = 1e-3
save_steps = 5
evaluation_inputs = ['1 ']
evaluation_freq = 4
evaluation_max_new_tokens = 4
validation_ratio = 0.1
tensorboard = False
num_threads = 1
custom_hooks = [{hook!r}] if {dies} else []
"""


def prepare(folder, model, tuning, *, dies):
    folder.mkdir()
    lines = "\n".join(json.dumps(row) for row in ROWS)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    (folder / "die.py").write_text(DYING_HOOK, encoding="utf-8")
    config = folder / "config.py"
    config.write_text(
        SETTINGS.format(model=str(model), tuning=tuning, hook="die.py:Die", dies=dies)
    )
    return config


def losses(work_dir):
    """Step to (loss, gradient norm, validation loss) over all starts; later starts win."""
    found = {}
    for file in sorted(work_dir.glob("*/scalars.jsonl")):
        for line in file.read_text().splitlines():
            values = json.loads(line)
            if "loss" in values:
                kept = (values["loss"], values["grad_norm"], values.get("val_loss"))
                found[values["step"]] = kept
    return found


@pytest.mark.parametrize("tuning", ["lora", "qlora", "full"])
def test_resumed_equals_straight(tuning, tmp_path, tiny_model_path, monkeypatch, capsys):
    monkeypatch.setenv("HOW_TO_DIE", "error")
    straight = prepare(tmp_path / "straight", tiny_model_path, tuning, dies=False)
    monkeypatch.chdir(straight.parent)
    assert main(["train", "config.py", "--work-dir", "w"]) == 0
    broken = prepare(tmp_path / "broken", tiny_model_path, tuning, dies=True)
    monkeypatch.chdir(broken.parent)
    assert main(["train", "config.py", "--work-dir", "w"]) == 2
    assert "died on purpose" in capsys.readouterr().err
    assert main(["train", "config.py", "--work-dir", "w", "--resume"]) == 0
    expected, found = losses(straight.parent / "w"), losses(broken.parent / "w")
    assert len(expected) > 10 and found == expected
    last = (straight.parent / "w" / "last_checkpoint").read_text().strip()
    name = "model.safetensors" if tuning == "full" else "adapter_model.safetensors"
    one, other = (p.parent / "w" / last / name for p in (straight, broken))
    assert one.read_bytes() == other.read_bytes()


def run_cli(folder, *arguments, **environment):
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "config.py", "--work-dir", "w"]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_kill_9_and_resume(tmp_path, tiny_model_path, monkeypatch, capsys):
    straight = prepare(tmp_path / "straight", tiny_model_path, "lora", dies=False)
    monkeypatch.chdir(straight.parent)
    assert main(["train", "config.py", "--work-dir", "w"]) == 0
    config = prepare(tmp_path / "killed", tiny_model_path, "lora", dies=True)
    killed = run_cli(config.parent, HOW_TO_DIE="SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    assert (config.parent / "w" / "last_checkpoint").read_text().strip() == "iter_5"
    monkeypatch.chdir(config.parent)
    assert main(["train", "config.py", "--work-dir", "w", "--resume", "iter_5"]) == 0
    assert "Resuming from w/iter_5 at step 5" in capsys.readouterr().out
    assert losses(config.parent / "w") == losses(straight.parent / "w")


def test_a_run_that_ended_before_its_first_save_starts_again(
    tmp_path, tiny_model_path, monkeypatch, capsys
):
    config = prepare(tmp_path / "early", tiny_model_path, "lora", dies=True)
    monkeypatch.chdir(config.parent)
    command = ["train", "config.py", "--work-dir", "w", "--set", "save_steps=90", "max_steps=8"]
    monkeypatch.setenv("HOW_TO_DIE", "error")
    assert main(command) == 2
    assert not list(Path("w").glob("iter_*"))
    monkeypatch.setenv("HOW_TO_DIE", "SIGCONT")  # which does nothing
    assert main(["train", "config.py", "--work-dir", "v", "--resume"]) == 2
    assert "v does not exist, and no run of these settings has started" in capsys.readouterr().err
    assert not Path("v").exists()
    assert main([*command, "--resume"]) == 0
    told = capsys.readouterr().out
    assert "w contains no checkpoint: starting from the beginning." in told
    assert main([*command, "--resume", "auto"]) == 0
    assert "Nothing to do: w/iter_8" in capsys.readouterr().out


def test_sigterm_saves_and_prints_how_to_resume(tmp_path, tiny_model_path):
    config = prepare(tmp_path / "stopped", tiny_model_path, "lora", dies=True)
    # An earlier run with DeepSpeed in the parent process leaves LOCAL_RANK; no launcher is meant.
    stopped = run_cli(config.parent, HOW_TO_DIE="SIGTERM", LOCAL_RANK="0")
    assert stopped.returncode == 130, stopped.stderr
    assert "xtuner train config.py --work-dir w --resume" in stopped.stderr
    assert (config.parent / "w" / "last_checkpoint").read_text().strip() == "iter_7"


def test_settings_that_shape_the_weights_cannot_change(
    tmp_path, tiny_model_path, monkeypatch, capsys
):
    config = prepare(tmp_path / "changed", tiny_model_path, "lora", dies=False)
    monkeypatch.chdir(config.parent)
    assert main(["train", "config.py", "--set", "max_steps=5"]) == 0
    assert main(["train", "config.py", "--resume", "--set", "lora_r=8"]) == 2
    assert "lora_r: 4 then, 8 now" in capsys.readouterr().err
    assert main(["train", "config.py", "--resume", "--set", "max_steps=7"]) == 0
    assert "max_steps: 5 then, 7 now" in capsys.readouterr().out
    assert main(["train", "config.py", "--resume", "--set", "max_steps=7"]) == 0
    assert "Nothing to do" in capsys.readouterr().out
