"""Shards of another size contain bitwise equal tensors."""

import pytest
import torch
from safetensors.torch import save_file

from xtuner.convert.split import split
from xtuner.convert.weights import Weights, parse_size
from xtuner.errors import ConfigError, ModelError
from xtuner.models.load import load_model
from xtuner.testing.tiny import tiny_model


def tensors(folder):
    weights = Weights.of_model(folder)
    return {name: weights[name] for name in weights.stored}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_same_bits_in_more_files(kind, tmp_path):
    state = tiny_model().state_dict()
    state["model.norm.weight"][0] = float("nan")
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    if kind == "bin":
        torch.save(state, source / "pytorch_model.bin")
    else:
        save_file(state, source / "model.safetensors")
    (source / "config.json").write_text("{}")
    (source / "inner" / "notes.txt").write_text("kept")
    split(source, tmp_path / "out", max_shard_size="50KB", log=str)
    found = tensors(tmp_path / "out")
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (tmp_path / "out" / "inner" / "notes.txt").read_text() == "kept"
    assert not list((tmp_path / "out").glob("*.bin"))
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert modes == {(tmp_path / "out").stat().st_mode & 0o666}


def test_transformers_reads_the_shards_and_back_to_one_file(tiny_model_path, tmp_path):
    split(tiny_model_path, tmp_path / "many", max_shard_size="50KB", log=str)
    before = load_model(tiny_model_path, dtype=torch.float32).state_dict()
    after = load_model(tmp_path / "many", dtype=torch.float32).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    split(tmp_path / "many", tmp_path / "one", log=str)
    assert [path.name for path in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_the_result_may_lie_inside_the_source(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    split(tmp_path, tmp_path / "shards", log=str)
    assert set(tensors(tmp_path / "shards")) == set(tensors(tmp_path))
    assert not (tmp_path / "shards" / "shards").exists()


def test_a_pickle_with_code_is_refused(tmp_path):
    torch.save({"a": torch.zeros(2), "b": pytest.raises}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        split(tmp_path, tmp_path / "out", log=str)


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_damaged_source_is_reported_and_leaves_no_output(damage, tiny_model_path, tmp_path):
    split(tiny_model_path, tmp_path / "source", max_shard_size="50KB", log=str)
    victim = min((tmp_path / "source").glob("*.safetensors"))
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-100])
    else:
        victim.unlink()
    with pytest.raises(ModelError, match=victim.name):
        split(tmp_path / "source", tmp_path / "out", log=str)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2_000_000_000), ("1.5 mb", 1_500_000), ("4KiB", 4096), ("7", 7), ("3G", 3 * 10**9)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "0", "iB", "5iB"])
def test_invalid_sizes(text):
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)
