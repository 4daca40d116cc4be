import json

import pytest

from xtuner.cli.app import main


def chat(*texts, **last):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    turns[-1] |= last
    return {"messages": turns}


ROWS = [
    chat("Hi", "Hello 你好"),
    chat("", "no question"),
    chat("one", "two", "three", "four"),
    chat("col\x1b[31mour", "red"),
]


@pytest.fixture
def config(tmp_path, tiny_model_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "my_run.py"
    path.write_text(
        f"pretrained_model_name_or_path = {str(tiny_model_path)!r}\n"
        "data_path = 'd.jsonl'\n"
        "max_length = 120\n"
        "shuffle = False\n"
    )
    return path


def shown(capsys, *arguments):
    assert main(["log-dataset", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_text_shows_what_is_learnt_and_where_samples_begin(config, capsys):
    out = shown(capsys, config)
    assert "<|im_start|>assistant\n«Hello 你好<|im_end|>»" in out
    assert "«two<|im_end|>»\n<|im_start|>user\nthree<|im_end|>" in out
    assert "pack 1 of 2: 92 tokens" in out and "pack 2" not in out
    assert "sample 1 of 2 · d.jsonl line 1 · 35 tokens, 13 supervised" in out
    assert "sample 2 of 2 · d.jsonl line 3 · 57 tokens, 9 supervised" in out
    assert "1 row lost: messages[0].content: is empty" in out
    assert "The tokens that are trained on are between « and »." in out


def test_loss_weights_are_shown(config, capsys):
    rows = [chat("one", "two", "three", "four", weight=0.5)]
    (config.parent / "d.jsonl").write_text(json.dumps(rows[0]) + "\n")
    out = shown(capsys, config)
    assert "«two<|im_end|>»\n" in out
    assert "«four<|im_end|>»(x0.5)" in out
    assert "1 row with loss weights" in out


def test_all_packs_are_shown_if_asked_for(config, capsys):
    out = shown(capsys, config, "-n", "9")
    assert "pack 2 of 2" in out
    assert "col␛[31mour" in out and "\x1b" not in out


def test_masked_text_counts_what_is_not_learnt(config, capsys):
    out = shown(capsys, config, "--show", "masked_text")
    assert "[… 21 tokens …]«Hello 你好<|im_end|>»[… 1 token …]" in out


def test_ids_and_labels_agree(config, capsys):
    def numbers(show):
        line = shown(capsys, config, "--show", show).splitlines()[2]
        return [int(word) for word in line.replace("«", "").replace("»", "").split()]

    ids, labels = numbers("input_ids"), numbers("labels")
    assert len(ids) == len(labels) == 35
    assert [a for a, b in zip(ids, labels, strict=True) if b != -100] == ids[21:34]
    assert set(labels[:21]) == {-100}


def test_all_shows_everything(config, capsys):
    out = shown(capsys, config, "--show", "all")
    assert all(f"\n{kind}:\n" in out for kind in ("text", "masked_text", "input_ids", "labels"))


def test_settings_can_be_overridden(config, capsys):
    assert "pack 1 of 3" in shown(capsys, config, "--set", "pack_to_max_length=False")


def test_missing_data_is_one_line(config, capsys):
    assert main(["log-dataset", str(config), "--set", "data_path=e.jsonl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("DataError: data_path 'e.jsonl': no such file")
    assert "Traceback" not in error
