"""A corrupted checkpoint is reported with the file; an intact or older one is used."""

import shutil
from pathlib import Path

import pytest
from helpers.checkpoint_maker import write_adapter

from xtuner.chat.opening import open_chat
from xtuner.convert.merge import merge
from xtuner.convert.to_hf import to_hf
from xtuner.errors import CheckpointError
from xtuner.models import manifest


@pytest.fixture(scope="module")
def intact(tmp_path_factory, tiny_model_path) -> Path:
    """A work dir with two checkpoints of one adapter."""
    work = tmp_path_factory.mktemp("work")
    write_adapter(work / "iter_9", tiny_model_path)
    manifest.write(work / "iter_9")
    shutil.copytree(work / "iter_9", work / "iter_10")
    return work


@pytest.fixture
def work(intact: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(intact, tmp_path / "w"))


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "run.yaml", "training_state.pt"],
)
def test_one_bit_is_named_with_the_newest_intact_checkpoint(name, work) -> None:
    manifest.check(work / "iter_10", resuming=True)
    flip(work / "iter_10" / name)
    with pytest.raises(CheckpointError, match=rf"iter_10/{name}: is damaged.*is .*/iter_9\. "):
        manifest.check(work / "iter_10", resuming=True)


def test_resume_files_may_be_missing_or_changed_otherwise(work) -> None:
    flip(work / "iter_9" / "training_state.pt")
    manifest.check(work / "iter_9")
    (work / "iter_10" / "training_state.pt").unlink()
    manifest.check(work / "iter_10")
    with pytest.raises(CheckpointError, match=r"is missing.* No other checkpoint is intact"):
        manifest.check(work / "iter_10", resuming=True)


def test_chat_merge_and_convert_refuse_a_changed_adapter(work, tiny_model_path, tmp_path) -> None:
    checkpoint = work / "iter_10"
    flip(checkpoint / "adapter_model.safetensors")
    for use in (
        lambda: open_chat(checkpoint),
        lambda: open_chat(tiny_model_path, adapter=checkpoint),
        lambda: merge(str(tiny_model_path), checkpoint, tmp_path / "merged"),
        lambda: to_hf(checkpoint, tmp_path / "hf"),
    ):
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: is damaged"):
            use()


def test_a_run_file_with_another_base_model_is_named_as_changed(work) -> None:
    file = work / "iter_10" / "run.yaml"
    file.write_text(file.read_text().replace("base_model: /", "base_model: /x/"))
    with pytest.raises(CheckpointError, match=r"run\.yaml: is damaged: it has"):
        open_chat(work / "iter_10")


def test_checkpoint_without_manifest_is_used_without_warning(work, tmp_path, caplog) -> None:
    (work / "iter_10" / manifest.FILE_NAME).unlink()
    flip(work / "iter_10" / "training_state.pt")
    manifest.check(work / "iter_10", resuming=True)
    assert not caplog.records
    to_hf(work / "iter_9", tmp_path / "hf", log=lambda line: None)
    assert not (tmp_path / "hf" / manifest.FILE_NAME).exists()  # its files differ


def test_a_part_is_checked_by_the_manifest_of_its_checkpoint(tmp_path) -> None:
    part = tmp_path / "iter_1" / "llm_adapter"
    part.mkdir(parents=True)
    (part / "w").write_text("abc")
    (tmp_path / "iter_1" / "other").write_text("abc")
    manifest.write(tmp_path / "iter_1")
    (tmp_path / "iter_1" / "other").write_text("abd")
    manifest.check(part)
    flip(part / "w")
    with pytest.raises(CheckpointError, match=r"llm_adapter/w: is damaged"):
        manifest.check(part)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"files": {"../x": {"bytes": 1, "sha256": ""}}}', '{"files": {"a": 3}}'],
    ids=["cut", "list", "outside", "entry"],
)
def test_a_damaged_manifest_is_named(text, tmp_path) -> None:
    (tmp_path / manifest.FILE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json: is damaged"):
        manifest.check(tmp_path)
