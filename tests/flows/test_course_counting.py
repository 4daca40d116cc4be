"""The course's third exercise with its own numbers: 10,001 rows, 300 and 600, overfitting.

Rows, accumulation, epochs and intervals are those of the course; model and max_length are small, so
that an epoch has about as many packs as there.
"""

import json
import re
import subprocess

import pytest

from xtuner.cli.app import main
from xtuner.testing.tiny import tiny_model_folder

QUESTION, ANSWER = "请做一下自我介绍", "我是小明的小助手"
NAME = "internlm2_1_8b_qlora_alpaca_e3"


def edit(path, **changes):
    """What a user does in an editor: change the value of a setting."""
    text = path.read_text(encoding="utf-8")
    for key, value in changes.items():
        one_line = re.compile(rf"^{key} = (\[\n(?:    .*\n)*\]|.*)$", re.MULTILINE)
        text, count = one_line.subn(lambda _, k=key, v=value: f"{k} = {v!r}", text)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_course_sees_300_and_600(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    tiny_model_folder(
        "model",
        num_hidden_layers=1,
        hidden_size=16,
        intermediate_size=32,
        head_dim=8,
        initializer_range=0.2,
    )
    row = {"messages": [{"role": "user", "content": QUESTION},
                        {"role": "assistant", "content": ANSWER}]}  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([row] * 10_001, ensure_ascii=False))
    assert main(["list-cfg", "-p", "internlm2_1_8b"]) == 0
    assert NAME in capsys.readouterr().out.splitlines()[:4]
    assert main(["copy-cfg", NAME, "."]) == 0
    config = f"{NAME}_copy.py"
    edit(
        tmp_path / config,
        pretrained_model_name_or_path="model",
        tuning="lora",
        data_path="data.json",
        dataset_format="openai",
        max_length=2048,
        max_epochs=2,
        save_steps=300,
        save_total_limit=3,
        evaluation_freq=300,
        evaluation_inputs=[QUESTION, "hello"],
    )
    wanted = ["--set", "evaluation_max_new_tokens=4", "tensorboard=False", "num_threads=1"]
    assert main(["train", config, "--work-dir", "train", *wanted]) == 0
    said = capsys.readouterr().out
    packs = int(re.search(r"in ([\d,]+) packs of 2,048", said)[1].replace(",", ""))
    ends = 2 * packs
    train = tmp_path / "train"
    saved = sorted(p.name for p in train.glob("iter_*") if p.is_dir())
    expected = [*[*range(300, ends, 300)][-2:], ends]
    assert saved == sorted(f"iter_{n}" for n in expected)
    asked = {int(p.stem.rpartition("_")[2]) for p in train.glob("*/eval_outputs_iter_*.txt")}
    assert asked == {0, *range(300, ends, 300), ends}
    newest = subprocess.run(
        "ls -t train/*.pth | head -n 1", shell=True, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert newest == f"train/iter_{ends}.pth"
    assert main(["convert", "pth_to_hf", config, newest, "hf", "--fp32"]) == 0
    assert main(["convert", "merge", "model", "hf", "final_model", "--max-shard-size", "2GB"]) == 0
