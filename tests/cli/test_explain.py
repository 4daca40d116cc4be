"""`xtuner explain`."""

import pytest

from xtuner.cli.app import main
from xtuner.config.explain import explain, table


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


def test_an_unknown_setting(capsys):
    assert main(["explain", "max_lenght"]) == 2
    assert "did you mean 'max_length'" in capsys.readouterr().err


def test_names_of_other_trainers_are_explained(capsys):
    assert main(["explain", "fsdp"]) == 0
    assert capsys.readouterr().out == (
        "fsdp: is not a setting; strategy = 'fsdp2' shards weights\n"
    )
    assert main(["explain", "learning_rate"]) == 0
    assert capsys.readouterr().out.startswith("learning_rate: use lr\n\nlr\n")


def test_text_fits_the_terminal():
    for text in (explain("prompt_template", width=60), explain("train_on_inputs", width=60)):
        assert max(map(len, text.splitlines())) <= 60
    assert max(map(len, table(width=70).splitlines())) == 70
