"""The first exercise of the course through the command line, with smaller sizes.

10,000 rows of one introduction, `copy-cfg`, a few edits, `train`, `convert pth_to_hf`, `convert
merge`, `chat`: on a tiny model and 400 rows. It learns the sentence by heart, as in the exercise.
"""

import json
import re
import shutil

import pytest

from xtuner.cli.app import main
from xtuner.testing.tiny import tiny_model_folder

NAME = "小明"
QUESTION = "请做一下自我介绍"
ANSWER = f"我是{NAME}的小助手"


def edit(path, **changes):
    """What a user does in an editor: change the value of a setting."""
    text = path.read_text(encoding="utf-8")
    for key, value in changes.items():
        one_line = re.compile(rf"^{key} = (\[\n(?:    .*\n)*\]|.*)$", re.MULTILINE)
        text, count = one_line.subn(lambda _, k=key, v=value: f"{k} = {v!r}", text)
        assert count == 1, key
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the model, the data and the finished run of the exercise."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XTUNER_CACHE", str(folder / "cache"))
        # A wider first draw than usual lets the frozen output head make confident predictions.
        sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
        sizes["initializer_range"] = 0.2
        tiny_model_folder(folder / "model", **sizes)
        row = {
            "messages": [
                {"role": "user", "content": QUESTION},
                {"role": "assistant", "content": ANSWER},
            ]
        }
        rows = [row] * 400
        text = json.dumps(rows, ensure_ascii=False, indent=2)
        (folder / "personal_assistant.json").write_text(text, encoding="utf-8")
        assert main(["copy-cfg", "smollm2_135m_instruct_qlora_alpaca_e3", "."]) == 0
        edit(
            folder / "smollm2_135m_instruct_qlora_alpaca_e3_copy.py",
            pretrained_model_name_or_path="model",
            data_path="personal_assistant.json",
            max_length=512,
            max_epochs=10,
            max_steps=60,
            evaluation_inputs=[QUESTION, "请介绍一下你自己"],
            evaluation_freq=30,
            accumulative_counts=1,
            lr=5e-3,
        )
        config = "smollm2_135m_instruct_qlora_alpaca_e3_copy.py"
        assert main(["train", config, "--work-dir", "train"]) == 0
        yield folder


def test_the_work_dir_is_as_the_course_shows_it(workshop):
    train = workshop / "train"
    assert (train / "last_checkpoint").read_text().strip() == "iter_60"
    assert (train / "smollm2_135m_instruct_qlora_alpaca_e3_copy.py").is_file()
    checkpoint = {p.name for p in (train / "iter_60").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.yaml"} <= checkpoint
    assert {"tokenizer.json", "training_state.pt"} <= checkpoint
    (log_dir,) = [p for p in train.iterdir() if p.name[0].isdigit()]
    logs = {p.name for p in log_dir.iterdir()}
    wanted = {"scalars.jsonl", f"{log_dir.name}.log", "loss_curve.png", "data_report.json"}
    assert wanted | {f"eval_outputs_iter_{n}.txt" for n in (0, 30, 60)} <= logs
    before, after = (
        (log_dir / f"eval_outputs_iter_{n}.txt").read_text(encoding="utf-8") for n in (0, 60)
    )
    assert ANSWER not in before and ANSWER in after
    report = json.loads((log_dir / "data_report.json").read_text())
    assert report["rows_used"] == 400 and report["duplicates"] == 399


def test_convert_merge_and_chat_keep_what_was_learned(workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    config = "smollm2_135m_instruct_qlora_alpaca_e3_copy.py"
    # `iter_60.pth` is what the old xtuner wrote and old scripts name.
    assert main(["convert", "pth_to_hf", config, "train/iter_60.pth", "hf", "--fp32"]) == 0
    assert main(["convert", "merge", "model", "hf", "final_model", "--max-shard-size", "2GB"]) == 0
    assert "difference" in capsys.readouterr().out
    assert main(["chat", "final_model", "--ask", QUESTION]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
    assert main(["chat", "train", "--ask", QUESTION]) == 0
    assert capsys.readouterr().out.strip() == ANSWER


def test_second_run_in_the_same_folder_needs_a_flag(workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    config = "smollm2_135m_instruct_qlora_alpaca_e3_copy.py"
    assert main(["train", config, "--work-dir", "train"]) == 2
    message = capsys.readouterr().err
    assert all(hint in message for hint in ("--resume", "--work-dir", "--overwrite"))
    broken = ["train", config, "--work-dir", "train", "--overwrite", "--set", "data_path=typo"]
    assert main(broken) == 2
    assert (workshop / "train" / "iter_60").is_dir()


def test_the_settings_file_survives_a_work_dir_beside_it(workshop, monkeypatch, tmp_path):
    source = workshop / "smollm2_135m_instruct_qlora_alpaca_e3_copy.py"
    config = tmp_path / "mine.py"
    config.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    before = config.read_bytes()
    monkeypatch.chdir(workshop)
    arguments = ["--work-dir", str(tmp_path), "--set", "max_steps=1"]
    assert main(["train", str(config), *arguments]) == 0
    assert config.read_bytes() == before and (tmp_path / "mine_resolved.py").is_file()


def test_a_checkpoint_moved_elsewhere_still_chats(workshop, monkeypatch, capsys, tmp_path):
    shutil.copytree(workshop / "train" / "iter_60", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["chat", "moved", "--ask", QUESTION]) == 0
    assert capsys.readouterr().out.strip() == ANSWER
