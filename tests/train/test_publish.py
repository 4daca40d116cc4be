"""Uploads to a hub on this machine, with the hub's own client."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from helpers.hub_server import TOKEN, hub_server

from xtuner.errors import ConfigError, LaunchError
from xtuner.models import manifest
from xtuner.training.publish import check_target, publish

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # httpx


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "iter_2"
    folder.mkdir(parents=True)
    base = str(tmp_path / "models" / "my_model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "training_state.pt").write_bytes(b"state")
    settings = {"pretrained_model_name_or_path": base, "data_path": [str(tmp_path / "d.jsonl")]}
    settings["system"] = f"use {TOKEN}"
    settings |= {"evaluation_stop_words": ["/s"], "custom_hooks": [f"{tmp_path}/my.py:Hook"]}
    info = {"kind": "adapter", "base_model": base, "settings": settings}
    info |= {"prompt_template": f"{tmp_path}/my.py:T", "template": {"SYSTEM": "{system}"}}
    info["visual_encoder"] = str(tmp_path / "clip")
    (folder / "run.yaml").write_text(yaml.safe_dump(info))
    manifest.write(folder)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine, which knows the token of this process."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    with hub_server() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    enable_progress_bars()


def test_result_is_uploaded_without_state_and_local_paths(checkpoint, hub, tmp_path):
    assert publish(checkpoint, "me/mine", private=True) == f"{hub.url}/me/mine"
    assert hub.repos == {"me/mine": "private"}
    files = {name.removeprefix("me/mine/"): content for name, content in hub.files.items()}
    assert "training_state.pt" not in files and files["adapter_model.safetensors"] == b"weights"
    assert not any(str(tmp_path).encode() in content for content in files.values())
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "my_model"
    assert b"library_name: peft" in files["README.md"]
    assert b"hf_" not in files["run.yaml"]
    info = yaml.safe_load(files["run.yaml"])
    assert (info["prompt_template"], info["visual_encoder"]) == ("my.py:T", "clip")
    assert info["settings"]["evaluation_stop_words"] == ["/s"]
    assert str(tmp_path) in (checkpoint / "run.yaml").read_text()  # the checkpoint is untouched
    listed = json.loads(files["manifest.json"])["files"]
    assert set(listed) == set(files) - {"manifest.json"}
    assert [path.name for path in checkpoint.parent.iterdir()] == ["iter_2"]


@pytest.mark.parametrize("where", ["/repos/create", "/large/", "/commit/"])
def test_failure_loses_nothing_and_says_how_to_upload(checkpoint, hub, tmp_path, where):
    hub.failing[where] = 403
    with pytest.raises(LaunchError, match=r"is done and saved in .*iter_2, but .*403") as caught:
        publish(checkpoint, "me/mine", private=True)
    assert "\n" not in str(caught.value) and "key=k" not in str(caught.value)
    manifest.check(checkpoint, resuming=True)
    words = shlex.split(str(caught.value).partition("Try again: ")[2])
    assert words[:3] == ["hf", "upload", "me/mine"] and words[4:] == ["--private"]
    left = {file.name: file.read_bytes() for file in Path(words[3]).iterdir()}
    assert "training_state.pt" not in left
    assert not any(str(tmp_path).encode() in content for content in left.values())
    hub.failing.clear()
    publish(checkpoint, "me/mine", private=True)
    assert "me/mine/run.yaml" in hub.files and not Path(words[3]).exists()


def test_files_that_cannot_be_prepared_are_not_offered_for_upload(checkpoint, hub):
    (checkpoint / "run.yaml").write_text("{")
    with pytest.raises(LaunchError, match="cannot be prepared") as caught:
        publish(checkpoint, "me/model", private=True)
    assert "hf upload" not in str(caught.value)
    assert [folder.name for folder in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_target_is_checked_before_a_run(hub, monkeypatch):
    check_target("me/mine")
    with pytest.raises(ConfigError, match="must be 'owner/name'"):
        check_target("mine")
    monkeypatch.setenv("HF_TOKEN", "hf_of_someone")
    with pytest.raises(ConfigError, match="does not accept the access token"):
        check_target("me/mine")
    hub.failing["/whoami"] = 500
    check_target("me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_target("me/mine")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="no access token"):
        check_target("me/mine")
