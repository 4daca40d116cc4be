"""Checkpoints of XTuner 0.x are read without executing code."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from xtuner.cli.app import main
from xtuner.errors import CheckpointError
from xtuner.hub import old_pth
from xtuner.models.vision.folder import read_projector

CONFIG = """
pretrained_model_name_or_path = {model!r}
tuning = "lora"
lora_r = 4
lora_alpha = 8
prompt_template = "chatml"
SYSTEM = "Be brief."
data_path = "rows.json"
max_length = 64
accumulative_counts = 1
max_steps = 1
lr = 1e-12
steps_are = "micro_batches"
dtype = "float32"
"""


class Recorder:
    """Writes a file when it is created."""

    def __init__(self, path):
        self.path = path
        (path / "ran").touch()

    def __reduce__(self):
        return Recorder, (self.path,)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}/ran",)


def adapter_tensors(model, layers=("q_proj", "down_proj")):
    """An adapter for the tiny model, with XTuner 0.x's names."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.split(".")[-2] not in layers:
            continue
        for letter, shape in (("A", (4, weight.shape[1])), ("B", (weight.shape[0], 4))):
            inner = name.replace(".weight", f".lora_{letter}.default.weight")
            key = f"llm.base_model.model.{inner}"
            found[key] = torch.randn(shape, generator=generator) * 0.1
    return found


@pytest.fixture
def run(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text(CONFIG.format(model=str(tiny_model_path)))
    rows = [{"conversation": [{"input": "Who?", "output": "I."}]}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path


def expected(tensors):
    return {n.removeprefix("llm.").replace(".default", ""): t for n, t in tensors.items()}


def test_an_adapter_becomes_one_of_today_and_nothing_in_the_file_runs(run, tiny_model_path):
    tensors = adapter_tensors(tiny_model_path)
    content = {
        "meta": {"iter": 768},
        "state_dict": tensors,
        "message_hub": Recorder(run),
        "scalars": torch.zeros(3).numpy(),
    }
    torch.save(content, "iter_768.pth")
    (run / "ran").unlink()
    arguments = ["convert", "pth_to_hf", "config.py", "iter_768.pth", "hf", "--fp32"]
    assert main(arguments) == 0
    assert not (run / "ran").exists()
    found = load_file(run / "hf" / "adapter_model.safetensors")
    assert found.keys() == expected(tensors).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected(tensors).items())
    config = json.loads((run / "hf" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert "chatml" in (run / "hf" / "run.yaml").read_text()


def test_a_file_that_would_run_a_command_is_refused(run, tiny_model_path, capsys):
    torch.save({"state_dict": adapter_tensors(tiny_model_path), "x": Command(run)}, "iter_1.pth")
    assert main(["convert", "pth_to_hf", "config.py", "iter_1.pth", "hf"]) == 2
    assert "GLOBAL" in capsys.readouterr().err
    assert not (run / "ran").exists()


def test_deepspeeds_folder_is_read_too(run, tiny_model_path):
    tensors = adapter_tensors(tiny_model_path)
    (run / "iter_600.pth").mkdir()
    torch.save({"module": tensors}, "iter_600.pth/mp_rank_00_model_states.pt")
    assert main(["convert", "pth_to_hf", "config.py", "iter_600.pth", "hf"]) == 0
    found = load_file(run / "hf" / "adapter_model.safetensors")
    assert found.keys() == expected(tensors).keys()


def test_frozen_weights_beside_an_adapter_are_left_out(run, tiny_model_path):
    """As in DeepSpeed's folder of a PEFT model inside another module."""
    tensors = adapter_tensors(tiny_model_path)
    names = [name.replace("llm.", "model.") for name in tensors]
    layer = "model.base_model.model.model.layers.0"
    frozen = {
        f"{layer}.self_attn.q_proj.base_layer.weight": torch.ones(32, 32),
        f"{layer}.input_layernorm.weight": torch.ones(32),
        "model.base_model.model.lm_head.original_module.weight": torch.ones(261, 32),
    }
    saved = {"model.base_model.model.lm_head.modules_to_save.default.weight": torch.zeros(261, 32)}
    module = {**dict(zip(names, tensors.values(), strict=True)), **frozen, **saved}
    (run / "iter_600.pth").mkdir()
    torch.save({"module": module}, "iter_600.pth/mp_rank_00_model_states.pt")
    assert main(["convert", "pth_to_hf", "config.py", "iter_600.pth", "hf"]) == 0
    found = load_file(run / "hf" / "adapter_model.safetensors")
    assert found.keys() == {*expected(tensors), "base_model.model.lm_head.weight"}
    config = json.loads((run / "hf" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]


def test_a_run_starts_from_its_weights(run, tiny_model_path, capsys):
    layers = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    tensors = adapter_tensors(tiny_model_path, layers)
    torch.save({"state_dict": tensors}, "iter_768.pth")
    assert main(["train", "config.py", "--work-dir", "work", "--resume", "iter_768.pth"]) == 0
    assert "starts from its weights, at step 0" in capsys.readouterr().out
    found = load_file(run / "work" / "iter_1" / "adapter_model.safetensors")
    for name, tensor in expected(tensors).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert (run / "work" / "iter_1.pth").read_text() == "iter_1\n"


def test_the_projector_of_the_course_is_read(tmp_path):
    names = ("model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias")
    tensors = {f"projector.{n}": torch.full((2, 2), float(i)) for i, n in enumerate(names)}
    torch.save({"meta": {}, "state_dict": tensors}, tmp_path / "iter_2181.pth")
    found = read_projector(tmp_path / "iter_2181.pth")
    assert {name: float(tensor[0, 0]) for name, tensor in found.items()} == {
        "linear_1.weight": 0, "linear_1.bias": 1, "linear_2.weight": 2, "linear_2.bias": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no pickle" * 40, "cannot be read as a checkpoint"),
        ({"state_dict": {}, "filler": "x" * 300}, "holds no weights"),
        ({"state_dict": {"projector.model.0.weight": torch.ones(40)}}, "parts of a LLaVA model"),
    ],
    ids=["damaged", "empty", "a projector for a text run"],
)
def test_unreadable_settings_are_reported(run, content, words, capsys):
    if isinstance(content, bytes):
        (run / "iter_1.pth").write_bytes(content)
    else:
        torch.save(content, run / "iter_1.pth")
    assert main(["convert", "pth_to_hf", "config.py", "iter_1.pth", "hf"]) == 2
    assert words in capsys.readouterr().err
    assert not (run / "hf").exists()


def test_an_alias_is_no_old_checkpoint(tmp_path):
    (tmp_path / "iter_3.pth").write_text("iter_3\n")
    assert not old_pth.is_old(tmp_path / "iter_3.pth")
    with pytest.raises(CheckpointError, match="cannot be read"):
        old_pth.read(tmp_path)
