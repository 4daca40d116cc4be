"""The command lines of XTuner 0.x."""

import pytest

from xtuner.cli._old_words import translated
from xtuner.cli.app import expand_overrides, main
from xtuner.config.load import load_settings
from xtuner.errors import ConfigError


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("help", "--help"),
        ("help train", "train --help"),
        ("version", "--version"),
        ("-v", "--version"),
        ("chat M --torch-dtype fp16 --bits 4", "chat M --dtype float16 --bits 4"),
        ("chat M --torch-dtype=bf16", "chat M --dtype bfloat16"),
        ("chat M --stop-words a b --seed 3", "chat M --stop-words a --stop-words b --seed 3"),
        ("chat --stop-words a M", "chat --stop-words a M"),
        ("chat M --command-stop-word <eoc> --answer-stop-word <eom>",
         "chat M --stop-words <eoc> --stop-words <eom>"),
        ("chat M --bot-name Ming --offload-folder x --top-k 3", "chat M --top-k 3"),
        ("chat M --visual-select-layer -2 --bits 4", "chat M --bits 4"),
        ("mmbench M --torch-dtype fp16 --bot-name X --seed 1 --limit 3", "mmbench M --limit 3"),
        ("convert merge M A D --safe-serialization --fp", "convert merge M A D --fp"),
        ("test C --checkpoint K --launcher none", "test C --checkpoint K"),
        ("train C --seed 3", "train C --set seed=3"),
        ("train C --local_rank=1", "train C"),
        ("train C --set seed=1 lr=2", "train C --set seed=1 lr=2"),
    ],
)  # fmt: skip
def test_old_command_lines(old, new):
    assert translated(old.split()) == new.split()


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("preprocess arxiv a b", "dataset_format = 'arxiv'"),
        ("eval_refcoco M", "xtuner mmbench"),
        ("dist_train C 8", "--nproc"),
        ("chat M --system-template nobody", "alpaca"),
        ("chat M --visual-select-layer -1", "visual_select_layer"),
        ("convert pth_to_hf C P D --save-format official", "--save-format huggingface"),
    ],
)
def test_removed_commands_name_their_replacement(old, words):
    with pytest.raises(ConfigError, match=words):
        translated(old.split())


def test_a_system_template_is_its_text(capsys):
    flag, text = translated(["chat", "M", "--system-template", "sql"])[2:]
    assert flag == "--system" and "SQL" in text
    assert "own wording" in capsys.readouterr().err


def test_old_cfg_options_still_work():
    words = "--cfg-options randomness.seed=7 train_dataloader.batch_size=2 "
    words += "optim_wrapper.optimizer.lr=1e-4 default_hooks.checkpoint.interval=300"
    expanded = expand_overrides(words.split())
    settings = load_settings("internlm2_1_8b_qlora_alpaca_e3", overrides=expanded[1::2]).settings
    assert (settings.seed, settings.batch_size, settings.lr) == (7, 2, 1e-4)
    assert settings.save_steps == 300
    with pytest.raises(ConfigError, match="is a name of XTuner 0"):
        load_settings("internlm2_1_8b_qlora_alpaca_e3", overrides=["model.llm.x=3"])


def test_help_and_version_answer(capsys):
    assert main(["version"]) == 0
    assert main(["help"]) == 0
    assert "Commands" in capsys.readouterr().out
