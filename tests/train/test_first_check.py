"""Checks of a run before it imports torch."""

import json
import subprocess
import sys

import pytest

from xtuner.config.load import load_settings
from xtuner.errors import ConfigError, DataError
from xtuner.training.first_check import first_check, optimizer_names


def checked(folder, monkeypatch, **changes):
    monkeypatch.chdir(folder)
    (folder / "m").mkdir(exist_ok=True)
    (folder / "m" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "rows.csv").write_text("question,answer\na,b\n")
    first_check(
        load_settings(
            {"pretrained_model_name_or_path": "m", "data_path": "rows.csv", **changes},
        )
    )


def test_valid_calls_pass(tmp_path, monkeypatch):
    checked(tmp_path, monkeypatch)
    checked(tmp_path, monkeypatch, pretrained_model_name_or_path="org/name", data_path="org/data")
    (tmp_path / "f.py").write_text("raise SystemExit('is not run')\n")
    checked(tmp_path, monkeypatch, dataset_format="f.py:to_messages")


def test_all_problems_are_listed(tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        checked(
            tmp_path,
            monkeypatch,
            data_path=["row.csv"],
            optim_type="AdamV",
            attn_implementation="flash_attention_3",
            pretrained_model_name_or_path="./n",
        )
    message = str(caught.value)
    assert message.startswith("4 problems:")
    for text in (
        "did you mean 'rows.csv'?",
        "no such folder",
        "did you mean 'Adam",
        "needs the package flash-attn-3",
    ):
        assert text in message


def test_optimizers_of_other_trainers_get_no_lookalike(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="unknown optimizer; 'dion' is not available; 'AdamW'"):
        checked(tmp_path, monkeypatch, optim_type="dion")
    checked(tmp_path, monkeypatch, optim_type="lion_pytorch")


def test_a_missing_file_to_validate_on_is_named(tmp_path, monkeypatch):
    checked(tmp_path, monkeypatch, validation_path="rows.csv")
    with pytest.raises(DataError, match=r"^validation_path 'row.csv': no such file .*'rows.csv'"):
        checked(tmp_path, monkeypatch, validation_path="row.csv")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "it has no config.json"),
        ({"adapter_config.json": "{}"}, "is an adapter, not a model"),
        ({"config.json": "{"}, "config.json cannot be read"),
        ({"config.json": "[]"}, "names no model_type"),
    ],
    ids=["empty", "adapter", "not json", "no model"],
)
def test_folder_without_a_model(tmp_path, monkeypatch, files, problem):
    (tmp_path / "other").mkdir()
    for name, text in files.items():
        (tmp_path / "other" / name).write_text(text)
    with pytest.raises(ConfigError, match=problem):
        checked(tmp_path, monkeypatch, pretrained_model_name_or_path="other")


def test_columns_are_checked_too(tmp_path, monkeypatch):
    (tmp_path / "odd.csv").write_text("kunde,beraten\na,b\n")
    with pytest.raises(DataError, match="columns = "):
        checked(tmp_path, monkeypatch, data_path="odd.csv")


def test_the_optimizers_are_those_that_training_finds():
    import bitsandbytes.optim
    import torch

    real = {
        name
        for module in (torch.optim, bitsandbytes.optim)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert {*optimizer_names()} == real - {"Optimizer", "LBFGS", "SparseAdam"}


def test_command_reports_errors_before_importing_torch(tmp_path):
    """A missing data file, and a work dir with checkpoints of an earlier run."""
    text = "pretrained_model_name_or_path = 'a/b'\ndata_path = "
    (tmp_path / "c.py").write_text(text + "'no.csv'\n")
    (tmp_path / "d.py").write_text(text + "'d.csv'\n")
    (tmp_path / "d.csv").write_text("question,answer\na,b\n")
    (tmp_path / "w" / "iter_9").mkdir(parents=True)
    (tmp_path / "w" / "iter_10").mkdir()
    code = (
        "import sys; from xtuner.cli.app import main; code = main(['train', 'c.py']); "
        "code += main(['train', 'd.py', '--work-dir', 'w']); "
        "print(code, sorted({'torch', 'transformers', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    checking = [f"Checking {name}: settings, data, model" for name in "cd"]
    assert done.stdout.splitlines() == [*checking, "4 []"]
    assert "no such file or folder" in done.stderr
    assert "w contains iter_10 of an earlier run. Add --resume" in done.stderr
    assert "Exception" not in done.stderr
