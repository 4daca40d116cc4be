"""Image features cached on disk do not change results, whatever happens to the cache."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from xtuner.cli.app import main
from xtuner.config.schema import Settings
from xtuner.data.images.feature_store import FeatureStore
from xtuner.models.vision.llava import LlavaEmbedder
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower, tiny_vision_tower_folder
from xtuner.training.vision import RunVision


@pytest.fixture
def workshop(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vision_tower_folder(tmp_path / "clip", initializer_range=0.5)
    tiny_llava_data(tmp_path / "data.json", tmp_path / "images", count=8)
    (tmp_path / "run.py").write_text(
        f"llm_name_or_path = {str(tiny_model_path)!r}\n"
        "visual_encoder_name_or_path = 'clip'\ndata_path = 'data.json'\nimage_folder = 'images'\n"
        "max_length = 96\ntuning = 'full'\nfreeze_llm = True\ndtype = 'float32'\nlr = 1e-2\n"
        "accumulative_counts = 1\nbatch_size = 2\nmax_epochs = 2\ntensorboard = False\n"
    )
    return tmp_path


@pytest.fixture
def encoded(monkeypatch):
    """Counts the images that go through the vision tower."""
    counts = []
    features = LlavaEmbedder.features

    def counted(self, pixels):
        counts.append(len(pixels))
        return features(self, pixels)

    monkeypatch.setattr(LlavaEmbedder, "features", counted)
    return counts


def losses(work_dir, *settings):
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "run.py", "--work-dir", work_dir, *words]) == 0
    (file,) = Path(work_dir).glob("*/scalars.jsonl")
    return [
        line["loss"] for line in map(json.loads, file.read_text().splitlines()) if "loss" in line
    ]


def test_losses_are_those_without_and_the_encoder_rests(workshop, encoded):
    plain = losses("plain")
    assert sum(encoded) == 12  # six of eight rows have an image, two epochs
    encoded.clear()
    kept = losses("kept", "cache_visual_features=True")
    assert sum(encoded) == 6
    encoded.clear()
    again = losses("again", "cache_visual_features=True")
    assert sum(encoded) == 0
    assert len(plain) == 8 and plain == kept == again


def folder_of(path="clip", **changes):
    """The folder of a run's features."""
    settings = Settings(
        pretrained_model_name_or_path="-", data_path="-", visual_encoder_name_or_path=path,
        tuning="full", freeze_llm=True, cache_visual_features=True, **changes,
    )  # fmt: skip
    vision = RunVision.of(settings, tiny_tokenizer(), folder=Path())
    vision.join(tiny_model(), dtype=torch.float32, device="cpu", source=None)
    return vision.features.folder


def changed(file, **values):
    text = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**text, **values}))


def test_different_preprocessing_uses_a_separate_cache(workshop):
    clip = workshop / "clip"
    seen = [folder_of()]
    assert folder_of() == seen[0]
    (clip / "model.safetensors").unlink()
    for seed in (1, 2):  # weights that are not safetensors
        torch.save(tiny_vision_tower(seed=seed).state_dict(), clip / "pytorch_model.bin")
        seen.append(folder_of())
    changed(clip / "config.json", hidden_act="relu")
    seen.append(folder_of())
    changed(clip / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    seen.append(folder_of())
    seen.append(folder_of(pad_image_to_square=False))
    seen.append(folder_of(visual_select_layer=-3))
    assert len({*seen}) == len(seen) == 7


def test_same_encoder_in_another_folder_uses_the_same_cache(workshop):
    before = folder_of()
    (workshop / "clip").rename(workshop / "moved")
    assert folder_of("moved") == before


def test_damaged_entry_is_ignored(workshop, encoded):
    losses("one", "cache_visual_features=True")
    store = FeatureStore()
    files = sorted(Path(os.environ["XTUNER_CACHE"], "features").rglob("*.npy"))
    assert len(files) == 6
    store.folder, store.shape = files[0].parent.parent, (4, 32)
    assert store.read(files[0].stem).shape == (4, 32)
    np.save(files[0], np.zeros((5, 32), np.float32))
    np.save(files[1], np.zeros((4, 32), np.float64))
    files[2].write_bytes(files[2].read_bytes()[:-7])
    assert all(store.read(file.stem) is None for file in files[:3])
    encoded.clear()
    assert losses("two", "cache_visual_features=True") == losses("plain")
    assert sum(encoded) >= 3 and store.read(files[0].stem).shape == (4, 32)


def test_nothing_is_kept_before_the_encoder_is_known():
    store = FeatureStore()
    store.write("ab12", torch.zeros(2, 3))
    assert store.read("ab12") is None
    store.open({"encoder": "a"}, shape=(2, 3))
    store.write("ab12", torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.equal(store.read("ab12"), torch.ones(2, 3, dtype=torch.bfloat16))
