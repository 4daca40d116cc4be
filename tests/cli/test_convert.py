"""`xtuner convert`: exit codes, messages, and the way from a checkpoint to a merged model."""

import pytest
import torch

from xtuner.cli.app import main
from xtuner.convert.weights import Weights
from xtuner.models.adapters import add_adapter
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo
from xtuner.models.save import save_model
from xtuner.testing.tiny import tiny_tokenizer


@pytest.fixture
def run_folder(tiny_model_path, tmp_path):
    """A settings file and work_dir/iter_7, an adapter."""
    model = add_adapter(load_model(tiny_model_path, dtype=torch.float32), r=4, alpha=8)
    folder = tmp_path / "work_dir" / "iter_7"
    folder.mkdir(parents=True)
    save_model(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    RunInfo("adapter", str(tiny_model_path)).write(folder)
    settings = f"pretrained_model_name_or_path = {str(tiny_model_path)!r}\ndata_path = 'x.jsonl'\n"
    (tmp_path / "config.py").write_text(settings)
    return tmp_path


def convert(*words):
    return main(["convert", *map(str, words)])


def test_checkpoint_to_merged_model(run_folder, tiny_model_path, capsys, monkeypatch):
    checkpoint = run_folder / "work_dir" / "iter_7.pth"
    assert convert("pth_to_hf", run_folder / "config.py", checkpoint, run_folder / "hf") == 0
    said = capsys.readouterr()
    merged = run_folder / "hf_merged"
    command = f"xtuner convert merge {tiny_model_path} {run_folder / 'hf'} {merged}"
    assert command in said.out
    assert f"by its folder on this machine, {tiny_model_path}. To share it, write" in said.err
    assert main(command.split()[1:]) == 0
    said = capsys.readouterr().out
    assert "merged shard by shard" in said and "base + adapter:" in said
    assert said.endswith(f"xtuner chat {merged}\n")
    shards = run_folder / "shards"
    monkeypatch.setenv("HOME", str(run_folder))
    assert convert("split", merged, "~/shards", "--max-shard-size", "50KB") == 0
    assert len(Weights.of_model(shards).files) > 1
    assert RunInfo.read(shards).kind == "model"


def test_a_config_with_another_model_gets_a_warning(run_folder, capsys):
    config = run_folder / "config.py"
    config.write_text("pretrained_model_name_or_path = 'some/other'\ndata_path = 'x.jsonl'\n")
    assert convert("pth_to_hf", config, run_folder / "work_dir/iter_7", run_folder / "hf") == 0
    assert "some/other" in capsys.readouterr().err


def test_impossible_request_exits_with_2_and_a_hint(run_folder, tiny_model_path, capsys):
    adapter, taken = run_folder / "work_dir/iter_7", run_folder / "work_dir"
    wrong = {
        "give another folder": ("merge", tiny_model_path, adapter, taken),
        "is not an adapter": ("merge", tiny_model_path, tiny_model_path, run_folder / "a"),
        "is not a model": ("split", taken, run_folder / "a"),
        "such as '2GB'": ("split", tiny_model_path, run_folder / "a", "--max-shard-size", "big"),
        "is not a checkpoint": ("pth_to_hf", run_folder / "config.py", "iter_1", run_folder / "a"),
        "no such file": ("pth_to_hf", "none.py", adapter, run_folder / "a"),
    }
    for message, words in wrong.items():
        assert convert(*words) == 2, words
        assert message in capsys.readouterr().err
    assert not (run_folder / "a").exists()


def test_help_says_that_the_base_is_unquantized(capsys):
    assert convert("merge", "--help") == 0
    assert "unquantized" in capsys.readouterr().out
