"""Uploads to a fake hub."""

import json

import pytest
import yaml

from xtuner.errors import ConfigError, LaunchError
from xtuner.models import manifest
from xtuner.training.publish import check_target, publish


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "iter_2"
    folder.mkdir(parents=True)
    base = str(tmp_path / "models" / "my_model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "training_state.pt").write_bytes(b"state")
    settings = {"pretrained_model_name_or_path": base, "data_path": [str(tmp_path / "d.jsonl")]}
    info = {"kind": "adapter", "base_model": base, "settings": settings}
    (folder / "run.yaml").write_text(yaml.safe_dump(info))
    manifest.write(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what is uploaded."""
    import huggingface_hub

    kept = {}

    class Api:
        def create_repo(self, repo, *, private, exist_ok):
            kept["repo"] = (repo, private)
            return f"https://hub.example/{repo}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            from pathlib import Path

            files = Path(folder_path).iterdir()
            kept["files"] = {file.name: file.read_bytes() for file in files}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return kept


def test_result_is_uploaded_without_state_and_local_paths(checkpoint, hub, tmp_path):
    assert publish(checkpoint, "me/mine", private=True) == "https://hub.example/me/mine"
    assert hub["repo"] == ("me/mine", True)
    files = hub["files"]
    assert "training_state.pt" not in files and files["adapter_model.safetensors"] == b"weights"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my_model"
    assert b"library_name: peft" in files["README.md"]
    assert str(tmp_path) in (checkpoint / "run.yaml").read_text()  # the checkpoint is untouched
    listed = json.loads(files["manifest.json"])["files"]
    assert set(listed) == set(files) - {"manifest.json"}


def test_failure_says_that_the_run_is_saved(checkpoint, hub, monkeypatch):
    import huggingface_hub

    def refuse(self, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refuse)
    with pytest.raises(
        LaunchError, match=r"is done and saved in .*iter_2.*no network.*hf upload me"
    ):
        publish(checkpoint, "me/mine", private=True)


def test_target_is_checked_before_a_run(monkeypatch):
    with pytest.raises(ConfigError, match="must be 'owner/name'"):
        check_target("mine")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="no access token"):
        check_target("me/mine")
