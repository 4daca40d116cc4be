"""The first and third exercise of the course with its own commands and numbers.

10,001 rows, 26 in a pack, accumulation, epochs and intervals are those of the course, as are the
commands and their order; paths, the size of the model and the length of a pack in tokens differ.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from internlm2_maker import Shape, write_internlm2
from safetensors.torch import load_file
from test_course import edit

from xtuner.cli.app import main

QUESTION, ANSWER = "请做一下自我介绍", "我是剑锋大佬的小助手"
ASKED = ["请你介绍一下你自己", "你是谁", "你是我的小助手吗"]
NAME = "internlm2_1_8b_qlora_alpaca_e3"
ROW_TOKENS = 47
"""Tokens of a row with the small model's tokenizer; with InternLM2's it has 39."""
LIMITS = ["--set", "evaluation_max_new_tokens=4", "tensorboard=False", "num_threads=1"]


@pytest.fixture(scope="module")
def ft(tmp_path_factory):
    """The folder /root/ft of the course after training."""
    folder = tmp_path_factory.mktemp("ft")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XTUNER_CACHE", str(folder / "cache"))
        write_internlm2(folder / "model", shape=Shape(positions=4096))
        (folder / "data").mkdir()
        messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        rows = [{"messages": messages}] * 10_001
        text = json.dumps(rows, ensure_ascii=False, indent=4)
        (folder / "data" / "personal_assistant.json").write_text(text, encoding="utf-8")
        (folder / "config").mkdir()
        assert main(["copy-cfg", NAME, str(folder / "config")]) == 0
        edit(
            config_of(folder),
            pretrained_model_name_or_path=str(folder / "model"),
            data_path=str(folder / "data" / "personal_assistant.json"),
            dataset_format="openai",
            prompt_template="internlm2_chat",
            max_length=26 * ROW_TOKENS,
            max_epochs=2,
            save_steps=300,
            save_total_limit=3,
            evaluation_freq=300,
            evaluation_inputs=ASKED,
        )
        command = ["train", str(config_of(folder)), "--work-dir", str(folder / "train")]
        assert main([*command, *LIMITS]) == 0
    return folder


def config_of(folder):
    return folder / "config" / f"{NAME}_copy.py"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_300_and_600_are_saved_and_asked(ft, capsys):
    assert main(["list-cfg", "-p", "internlm2_1_8b"]) == 0
    assert NAME in capsys.readouterr().out.splitlines()[:2]
    train = ft / "train"
    saved = {p.name for p in train.iterdir() if p.suffix in (".pth", ".py", "")}
    wanted = {"iter_300.pth", "iter_600.pth", "iter_770.pth", "last_checkpoint"}
    assert {*wanted, f"{NAME}_copy.py"} <= saved
    asked = {int(p.stem.rpartition("_")[2]) for p in train.glob("*/eval_outputs_iter_*.txt")}
    assert asked == {0, 300, 600, 770}
    for file in train.glob("*/eval_outputs_iter_600.txt"):
        assert all(question in file.read_text(encoding="utf-8") for question in ASKED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_resumed_run_ends_as_the_first(ft, monkeypatch):
    monkeypatch.chdir(ft)
    weights = Path("train/iter_770/adapter_model.safetensors")
    straight = weights.read_bytes()
    shutil.rmtree("train/iter_770")
    command = ["train", str(config_of(ft)), "--work-dir", str(ft / "train")]
    assert main([*command, "--resume", str(ft / "train" / "iter_600.pth"), *LIMITS]) == 0
    assert weights.read_bytes() == straight


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_convert_merge_and_chat(ft, monkeypatch, capsys):
    monkeypatch.chdir(ft)
    for name in ("huggingface", "final_model"):
        Path(name).mkdir()  # as the course does
    newest = subprocess.run(
        "ls -t ./train/*.pth | head -n 1", shell=True, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert newest == "./train/iter_770.pth"
    config = f"{ft}/train/{NAME}_copy.py"
    convert = ["convert", "pth_to_hf", config, newest, f"{ft}/huggingface"]
    assert main([*convert, "--fp32", "--max-shard-size", "2GB"]) == 0
    monkeypatch.setenv("MKL_SERVICE_FORCE_INTEL", "1")
    merge = ["convert", "merge", f"{ft}/model", f"{ft}/huggingface", f"{ft}/final_model"]
    assert main([*merge, "--max-shard-size", "2GB"]) == 0
    layers = {name.split(".")[-2] for name in load_file("huggingface/adapter_model.safetensors")}
    assert layers == {"lora_A", "lora_B"}
    capsys.readouterr()
    answers = []
    for model in (["final_model"], ["model", "--adapter", "huggingface"], ["model"]):
        words = ["--prompt-template", "internlm2_chat", "--ask", QUESTION, "--dtype", "float32"]
        assert main(["chat", *model, *words, "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_deepspeed_on_one_process(ft, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.chdir(ft)
    command = ["train", str(config_of(ft)), "--work-dir", str(ft / "train_deepspeed")]
    limits = [*LIMITS, "max_steps=32", "max_dataset_length=900"]
    assert main([*command, "--deepspeed", "deepspeed_zero2", *limits]) == 0
    convert = ["convert", "pth_to_hf", str(config_of(ft)), "train_deepspeed/iter_32.pth", "hf"]
    assert main(convert) == 0
