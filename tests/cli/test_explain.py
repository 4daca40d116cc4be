"""`xtuner explain`."""

import pytest

from xtuner.cli.app import main


def test_one_setting(capsys):
    assert main(["explain", "lora_dropout"]) == 0
    shown = capsys.readouterr().out
    assert "a number >= 0 and < 1" in shown
    assert "default  0.0" in shown
    assert "PART 1  Model and method" in shown
    assert "The QLoRA paper" in shown


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("algorithm", ["sft", "pretrain"]),
        ("dataset_format", ["auto", "openai", "sharegpt"]),
        ("prompt_template", ["auto", "internlm2_chat"]),
    ],
)
def test_names_of_parts_are_listed(key, words, capsys):
    assert main(["explain", key]) == 0
    listed = capsys.readouterr().out.replace(",", " ").split()
    assert all(word in listed for word in words)


def test_all_settings(capsys):
    assert main(["explain"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("PART 1") < shown.index("max_length") < shown.index("PART 5")
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("key", "hint"),
    [("max_lenght", "did you mean 'max_length'"), ("fsdp", "strategy = 'fsdp2'")],
)
def test_an_unknown_setting(key, hint, capsys):
    assert main(["explain", key]) == 2
    assert hint in capsys.readouterr().err
