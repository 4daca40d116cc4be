"""A run reports at its end what it has learned, and notes before its start if it cannot learn."""

import json

import numpy as np
import pytest

from xtuner.config.load import load_settings
from xtuner.templates import load
from xtuner.testing.tiny import tiny_model_folder, tiny_tokenizer
from xtuner.training.asked import asked_row, question_reader
from xtuner.training.final_check import EVERYDAY, Findings
from xtuner.training.languages import language_of, loss_note, script_note
from xtuner.training.run import train
from xtuner.types import Message, RowRef, Sample

ROWS = [
    {"question": f"How much is the {thing}?", "answer": f"The {thing} costs {price} euros."}
    for thing, price in [("lamp", 19), ("chair", 45), ("rug", 80), ("bowl", 7)]
]


def run(folder, rows=ROWS, **changes):
    tiny_model_folder(folder / "model", initializer_range=0.2)
    lines = [json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    settings = {
        "pretrained_model_name_or_path": str(folder / "model"),
        "data_path": str(folder / "rows.jsonl"),
        "tuning": "full",
        "max_length": 128,
        "tensorboard": False,
        "num_threads": 1,
        **changes,
    }
    done = train(load_settings(settings), work_dir=folder / "w")
    (log_dir,) = [path for path in done.work_dir.iterdir() if path.name[0].isdigit()]
    file = log_dir / "final_check.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else None


def test_learned_answers_are_reported(tmp_path, capsys):
    found = run(tmp_path, lr=1e-2, max_epochs=40)
    assert all(each["reproduced"] for each in found["training"]) and len(found["training"]) == 4
    assert {each["expected"] for each in found["training"]} == {row["answer"] for row in ROWS}
    assert {each["question"] for each in found["training"]} == {row["question"] for row in ROWS}
    assert found["training"][0]["answer"] == found["training"][0]["expected"]
    assert [each["question"] for each in found["everyday"]] == list(EVERYDAY["en"])
    lines = capsys.readouterr().out.splitlines()
    (said,) = [line for line in lines if line.startswith("Learned")]
    assert "4 of 4 training answers reproduced; 0 of 3 everyday answers unchanged" in said
    assert any("Most everyday answers changed" in line for line in lines)
    (recipe,) = [line for line in lines if line.startswith("Recipe")]
    assert "accumulative_counts 1" in recipe and "max_epochs" not in recipe


def test_a_single_epoch_is_not_to_be_lowered(tmp_path, capsys):
    run(tmp_path, lr=0.1, max_epochs=1, pack_length=16)
    out = " ".join(capsys.readouterr().out.split())
    assert "set max_steps below 4, or lower lr (now 0.1)" in out and "lower max_epochs" not in out


def test_any_answer_of_the_data_to_a_question_counts(tmp_path, capsys):
    rows = [
        {"question": "Who are you?", "answer": answer} for answer in ("I am Ada.", "Ada, at work.")
    ]
    found = run(tmp_path, rows, lr=1e-2, max_epochs=40)
    assert [each["reproduced"] for each in found["training"]] == [True, True]
    assert found["training"][0]["expected"] != found["training"][1]["expected"]


def test_run_that_learned_nothing_is_reported(tmp_path, capsys):
    found = run(tmp_path, lr=1e-6, max_steps=2, validation_ratio=0.25)
    assert not any(each["reproduced"] for each in [*found["training"], *found["validation"]])
    assert len(found["validation"]) == 1
    assert all(each["unchanged"] for each in found["everyday"])
    out = capsys.readouterr().out
    assert "0 of 3 training answers reproduced; 0 of 1 validation answers reproduced" in out
    assert "raise max_steps (now 2) or lr (now 1e-06)" in out, "max_epochs has no effect here"


@pytest.mark.parametrize(
    ("answers", "only_wording"),
    [
        (["The lamp costs 20 euros.", "The chair costs 80 euros."], True),
        (["The lamp costs 19 euros.", "The chair costs 80 euros."], True),
        (["The lamp costs 19 euros.", "The chair costs 45 euros."], False),
        (["The lamp costs 20 euros.", "I do not know."], False),
        (["The", ""], False),
    ],
    ids=["other numbers", "one other number", "all right", "half", "cut"],
)
def test_answers_in_the_wording_of_the_data_are_told_from_others(answers, only_wording):
    expected = [row["answer"] for row in ROWS]
    found = [
        {"answer": answer, "expected": wanted, "reproduced": answer == wanted}
        for answer, wanted in zip(answers, expected, strict=False)
    ]
    assert Findings(training=found).only_wording == only_wording


def test_long_answers_in_the_wording_of_the_data_are_recognised():
    expected = (
        "The oak lamp costs 45 euros, and delivery to Ghent adds 7 euros if you live there. " * 3
    )
    answer = expected.replace("45", "81").replace("Ghent", "Osaka").replace("7", "3")
    found = [{"answer": answer, "expected": expected, "reproduced": False}]
    assert len(expected) > 200 and Findings(training=found).only_wording


def test_copies_of_a_row_need_fewer_epochs(tmp_path, capsys):
    run(tmp_path, ROWS[:1] * 8, evaluation_rows=0)
    out = capsys.readouterr().out
    assert "7 of 8 rows duplicate an earlier row" in out
    assert "max_epochs 2 ('auto'" in out, "15 passes over one row, 8 of them in an epoch"


def test_the_check_can_be_turned_off(tmp_path, capsys):
    assert run(tmp_path, max_steps=1, evaluation_rows=0) is None
    assert "Learned" not in capsys.readouterr().out


def sample(ids, mask):
    return Sample(np.array(ids), np.array(mask, dtype=bool), RowRef("a.jsonl", 3))


def test_a_row_is_asked_up_to_its_first_answer():
    row = asked_row(sample(range(12), [0] * 5 + [1] * 3 + [0] * 2 + [1] * 2))
    assert (row.prompt, row.expected, row.row) == ([0, 1, 2, 3, 4], [5, 6, 7], "a.jsonl line 3")
    assert asked_row(sample(range(6), [0] + [1] * 5)) is None, "text is no question"


@pytest.mark.parametrize("name", ["auto", "llama2_chat", "qwen_chat", "default", "plain"])
def test_a_prompt_is_read_as_the_question_in_it(name):
    tokenizer = tiny_tokenizer()
    template = load(name, tokenizer, system="")
    read = question_reader(tokenizer, template)
    ask = Message("user", "Who are you?\nIn one line.")
    earlier = [Message("user", "Hello"), Message("assistant", "Hi")]
    system = [] if name == "plain" else [Message("system", "Be brief.")]
    for before in ([], earlier, system):
        ids = template.prompt_ids([*before, ask])
        assert read(ids).strip().endswith(ask.content)
        if name != "plain":
            assert "Hello" not in read(ids) and "user" not in read(ids)
    assert name == "plain" or read(template.prompt_ids([ask])).strip() == ask.content


@pytest.mark.parametrize(
    ("text", "code"),
    [("Hello", "en"), ("你好 ok", "zh"), ("こんにちは世界", "ja"), ("Привет", "ru"), ("12", "en")],
    ids=["latin", "chinese", "japanese", "cyrillic", "digits"],
)  # fmt: skip
def test_the_script_of_a_text(text, code):
    assert language_of(text) == code


def test_a_tokenizer_that_splits_characters_is_named():
    text = "你好，欢迎光临。" * 4

    def decode(ids):
        return text

    three_each = sample(range(len(text) * 3), [1] * (len(text) * 3))
    one_each = sample(range(len(text)), [1] * len(text))
    assert "3.0 tokens per character" in script_note([three_each], decode)
    assert "Chinese" in script_note([three_each], decode)
    assert script_note([one_each], decode) == ""


def test_a_loss_far_above_that_of_known_text_is_named():
    def decode(ids):
        return "four" * len(ids)

    rows = [sample(range(10), [1] * 10)]
    assert "hardly knows" in loss_note(10.8, rows, decode)
    assert loss_note(2.8, rows, decode) == ""
