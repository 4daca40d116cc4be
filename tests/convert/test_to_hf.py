"""Converted checkpoints lack the files that only resuming needs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_maker import write_adapter

from xtuner.convert import output
from xtuner.convert.to_hf import find_checkpoint, to_hf
from xtuner.convert.weights import Weights
from xtuner.errors import CheckpointError, LaunchError
from xtuner.models.adapters import load_adapter
from xtuner.models.load import load_model
from xtuner.models.run_info import RunInfo


def convert(*arguments, **options):
    return to_hf(*arguments, log=str, **options)


@pytest.mark.parametrize("fp32", [False, True])
def test_an_adapter_stays_one(fp32, adapter, tiny_model_path, tmp_path):
    info = convert(adapter, tmp_path / "hf", fp32=fp32)
    assert info == RunInfo.read(tmp_path / "hf") == RunInfo.read(adapter)
    before, after = Weights.of_adapter(adapter), Weights.of_adapter(tmp_path / "hf")
    kind = torch.float32 if fp32 else torch.bfloat16
    assert set(before.stored) == set(after.stored)
    assert all(torch.equal(before[name].to(kind), after[name]) for name in before.stored)
    assert all(stored.dtype == kind for stored in after.stored.values())
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert {"adapter_config.json", "tokenizer.json", "run.yaml"} <= names
    assert "training_state.pt" not in names
    load_adapter(load_model(tiny_model_path, dtype=torch.float32), tmp_path / "hf")


def test_the_result_names_no_local_folders(tiny_model_path, full_checkpoint, tmp_path):
    """Except what an adapter needs to find its base model."""
    given = {
        "data_path": [str(Path.home() / "secret" / "d.jsonl"), "owner/data"],
        "work_dir": "/data/me/run", "SYSTEM": "/no_think", "dtype": "float32",
        "evaluation_stop_words": ["/s", "/end of"], "columns": {"/q": "user"}, "report_to": ["/x"],
        "custom_hooks": ["/data/me/my.py:Hook"], "strategy": "/data/me/zero.json",
        "pretrained_model_name_or_path": str(tiny_model_path),
    }  # fmt: skip
    shared = {
        **given, "data_path": ["d.jsonl", "owner/data"], "work_dir": "run",
        "custom_hooks": ["my.py:Hook"], "strategy": "zero.json",
    }  # fmt: skip
    source = write_adapter(tmp_path / "iter_1", tiny_model_path, settings=given)
    convert(source, tmp_path / "adapter")
    info = RunInfo.read(tmp_path / "adapter")
    assert (info.base_model, info.settings) == (str(tiny_model_path), shared)
    shutil.copytree(full_checkpoint, whole := tmp_path / "iter_2")
    RunInfo("model", str(tiny_model_path), settings=given).write(whole)
    convert(whole, tmp_path / "model")
    info = RunInfo.read(tmp_path / "model")
    name = tiny_model_path.name
    assert info.base_model == name
    assert info.settings == {**shared, "pretrained_model_name_or_path": name}


def test_a_template_whose_fields_are_recorded_is_named_without_its_folder():
    given = RunInfo(
        "llava", "/m/base", prompt_template="/data/me/my.py:T", visual_encoder="/m/clip"
    )
    assert given.without_local_paths() == given  # chat needs all of them
    whole = replace(given, kind="model", template={"prompt": "x"}).without_local_paths()
    names = (whole.base_model, whole.prompt_template, whole.visual_encoder)
    assert names == ("base", "my.py:T", "clip")


def test_an_adapter_of_a_float32_run_stays_float32(tiny_model_path, tmp_path):
    source = write_adapter(tmp_path / "iter_1", tiny_model_path, settings={"dtype": "float32"})
    convert(source, tmp_path / "hf")
    stored = Weights.of_adapter(tmp_path / "hf").stored
    assert {s.dtype for s in stored.values()} == {torch.float32}


def test_float16_run_is_written_in_float16(tiny_model_path, full_checkpoint, tmp_path):
    """Also if the setting was 'auto'."""
    source = write_adapter(tmp_path / "iter_1", tiny_model_path, settings={"dtype": "auto"})
    replace(RunInfo.read(source), dtype="float16").write(source)
    shutil.copytree(full_checkpoint, whole := tmp_path / "iter_2")
    RunInfo("model", str(tiny_model_path), dtype="float16").write(whole)
    for number, folder in enumerate((source, whole)):
        convert(folder, out := tmp_path / f"hf_{number}")
        weights = Weights.of_model(out) if number else Weights.of_adapter(out)
        assert {s.dtype for s in weights.stored.values()} == {torch.float16}


@pytest.mark.parametrize("fp32", [False, True])
def test_a_model_is_written_in_shards(fp32, full_checkpoint, tmp_path):
    convert(full_checkpoint, tmp_path / "hf", fp32=fp32, max_shard_size="30KB")
    kind = torch.float32 if fp32 else torch.bfloat16
    before, after = Weights.of_model(full_checkpoint), Weights.of_model(tmp_path / "hf")
    assert len(after.files) > 1 and set(before.stored) == set(after.stored)
    assert all(torch.equal(before[name].to(kind), after[name]) for name in before.stored)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == str(kind).removeprefix("torch.")
    assert not (tmp_path / "hf" / "training_state.pt").exists()
    assert load_model(tmp_path / "hf", dtype=kind).dtype == kind


def test_old_names_and_work_dirs_find_the_checkpoint(adapter):
    work_dir = adapter.parent
    assert find_checkpoint(work_dir / "iter_7.pth") == adapter
    (work_dir / "last_checkpoint").write_text("iter_7\n")
    assert find_checkpoint(work_dir) == adapter


def test_a_missing_checkpoint_names_those_there(adapter):
    with pytest.raises(CheckpointError, match=r"iter_8: is not a checkpoint.*iter_7"):
        find_checkpoint(adapter.parent / "iter_8.pth")


def test_a_file_of_an_earlier_version_is_explained(tmp_path):
    (tmp_path / "iter_5.pth").write_bytes(b"weights")
    with pytest.raises(CheckpointError, match=r"is a checkpoint of XTuner 0\.x; convert it first"):
        find_checkpoint(tmp_path / "iter_5.pth")


def test_a_taken_folder_is_refused_and_untouched(adapter, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LaunchError, match="is not empty; give another folder"):
        convert(adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_taken_and_a_killed_draft_replaced(adapter, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / ".hf.writing").mkdir()
    (tmp_path / ".hf.writing" / "half").write_text("half")
    convert(adapter, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert not (tmp_path / "hf" / "half").exists()


def test_a_failure_while_writing_leaves_nothing(adapter, tmp_path, monkeypatch):
    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output.shutil, "copyfile", full_disk)
    with pytest.raises(LaunchError, match="No space left"):
        convert(adapter, tmp_path / "new" / "hf")
    assert not list(tmp_path.iterdir())


def test_full_disk_is_detected_in_advance(full_checkpoint, tmp_path, monkeypatch):
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: nearly_full)
    with pytest.raises(LaunchError, match="free some space"):
        convert(full_checkpoint, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_the_adapter_of_a_llava_alone_knows_its_run(tmp_path, adapter):
    """Its run.yaml is one level up, and is written next to the result."""
    parts = tmp_path / "parts"
    shutil.copytree(adapter, parts / "llm_adapter")
    (parts / "projector").mkdir()
    (parts / "llm_adapter" / "run.yaml").rename(parts / "run.yaml")
    convert(parts / "llm_adapter", tmp_path / "alone")
    info, wanted = RunInfo.read(tmp_path / "alone"), RunInfo.read(adapter)
    assert info == wanted and info.kind == "adapter"
