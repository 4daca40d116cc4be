"""`xtuner migrate-cfg` and `train --migrate`: an old config is trained with its own numbers."""

import json

import pytest
from old_configs import SFT

from xtuner.cli.app import main

EVERY = 6
ROWS = 22


@pytest.fixture
def old(tmp_path, monkeypatch, tiny_model_path):
    """An old LoRA config next to its data; every row is a micro-batch, four are a step."""
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]}
    (tmp_path / "data").mkdir()
    rows = "\n".join([json.dumps(row)] * ROWS)
    (tmp_path / "data" / "rows.jsonl").write_text(rows, encoding="utf-8")
    text = SFT
    for before, after in {
        "'some/model'": repr(str(tiny_model_path)),
        "load_in_4bit=True": "load_in_4bit=False",
        "r=64": "r=4",
        "lora_dropout=0.1": "lora_dropout=0.0",
        "counts = 16": "counts = 4",
        "every = 300": f"every = {EVERY}",
        "epochs = 2": "epochs = 1",
        "pack_to_max_length=True": "pack_to_max_length=False",
        "max_keep_ckpts=3": "max_keep_ckpts=-1",
        "prompt_template=template)]": "prompt_template=template, max_new_tokens=2)]",
    }.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "old.py").write_text(text, encoding="utf-8")
    return tmp_path / "old.py"


def losses(work_dir):
    lines = [
        json.loads(line)
        for file in sorted(work_dir.glob("*/scalars.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_the_old_config_is_trained_with_its_own_numbers(old, tmp_path, capsys):
    assert main(["train", "--migrate", "old.py", "--set", "num_threads=1"]) == 0
    out = capsys.readouterr().out
    assert "Migrated old.py to old_migrated.py" in out
    assert "22, 4 per step; saved as iter_6 (step 1), iter_12 (step 3), iter_18 (step 4)" in out
    work_dir = tmp_path / "work_dirs" / "old"
    convert = ["convert", "pth_to_hf", str(work_dir / "old.py"), str(work_dir / "iter_22.pth")]
    assert main([*convert, "hf"]) == 0  # the work dir has the old config, as scripts expect
    capsys.readouterr()
    assert main(["test", "old.py"]) == 0  # its work dir has the newest checkpoint
    assert "Q: Who are you?" in capsys.readouterr().out
    for command in ("log-dataset", "check-custom-dataset"):
        assert main([command, "old.py"]) == 0
    saved = sorted(int(p.name.removeprefix("iter_")) for p in work_dir.glob("iter_*") if p.is_dir())
    assert saved == [6, 12, 18, 22]
    asked = [p.stem.rpartition("_")[2] for p in work_dir.glob("*/eval_outputs_iter_*.txt")]
    assert sorted(map(int, asked)) == [0, *saved]
    straight = losses(work_dir)
    assert sorted(straight) == list(range(1, 7))
    for name in ("iter_18", "iter_22"):
        (work_dir / name).rename(tmp_path / name)
    assert main(["train", "old_migrated.py", "--set", "num_threads=1", "--resume", "iter_12"]) == 0
    assert "at step 3" in capsys.readouterr().out
    assert losses(work_dir) == straight
    for name in ("iter_18", "iter_22"):
        weights = "adapter_model.safetensors"
        assert (work_dir / name / weights).read_bytes() == (tmp_path / name / weights).read_bytes()


def test_unreached_interval_is_noted(old, tmp_path, capsys):
    assert main(["migrate-cfg", "old.py", "new.py"]) == 0
    out = capsys.readouterr().out
    assert "Wrote new.py: sft lora" in out and "xtuner train new.py" in out
    overrides = ["num_threads=1", "max_steps=5", "save_steps=300", "evaluation_freq=400"]
    assert main(["train", "new.py", "--set", *overrides]) == 0
    out = capsys.readouterr().out
    assert "max_steps = 5 ends within step 2, which is completed at 8 micro-batches" in out
    assert "save_steps = 300 is more than the 8 micro-batches of this run" in out
    assert "evaluation_freq = 400 is more than the 8 micro-batches of this run" in out
    assert (tmp_path / "work_dirs" / "old" / "iter_8").is_dir()


def test_commands_report_obstacles(old, tmp_path, capsys):
    assert main(["train", "old.py"]) == 2
    assert "xtuner migrate-cfg old.py" in capsys.readouterr().err
    (tmp_path / "new.py").write_text("lr = 1.0\n")
    assert main(["migrate-cfg", "old.py", "new.py"]) == 2
    assert "exists with different content" in capsys.readouterr().err
    assert (tmp_path / "new.py").read_text() == "lr = 1.0\n"
    assert main(["migrate-cfg", "missing.py"]) == 2
    assert main(["migrate-cfg", "new.py"]) == 2
    assert "needs no migration" in capsys.readouterr().err
    text = old.read_text().replace("bias='none'", "use_qalora=True")
    old.write_text(text)
    assert main(["migrate-cfg", "old.py"]) == 2
    assert "line 45, lora.use_qalora = True" in capsys.readouterr().err
    assert not (tmp_path / "old_migrated.py").exists()
