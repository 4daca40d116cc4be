"""Checkpoints of XTuner 0.x with all weights of a model: a language model, or LLaVA's parts."""

import json

import pytest
import torch
from internlm2_maker import forward, write_internlm2
from parts_maker import answer
from safetensors.torch import load_file

from xtuner.cli.app import main
from xtuner.models.load import load_model
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower_folder

IDS = [1, 5, 300, 17, 42, 99, 7, 12, 250, 31]
TEXT = """
pretrained_model_name_or_path = {model!r}
tuning = "full"
prompt_template = "chatml"
data_path = "rows.json"
max_length = 64
accumulative_counts = 1
max_steps = 1
lr = 1e-12
dtype = "float32"
"""
LLAVA = """
llm_name_or_path = "base"
visual_encoder_name_or_path = "clip"
tuning = "full"
freeze_visual_encoder = False
prompt_template = "chatml"
data_path = "rows.json"
image_folder = "images"
max_length = 96
accumulative_counts = 1
max_steps = 1
lr = 1e-12
dtype = "float32"
"""


def write_pth(path, tensors, *, deepspeed):
    """A checkpoint as XTuner 0.x writes it: one file, or DeepSpeed's folder."""
    if deepspeed:
        path.mkdir()
        torch.save({"module": tensors}, path / "mp_rank_00_model_states.pt")
    else:
        torch.save({"meta": {"iter": 5}, "state_dict": tensors}, path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models `base` and `clip`, the trained ones `trained` and `trained_clip`, and rows."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model_folder(folder / "base", initializer_range=0.2)
    tiny_model_folder(folder / "trained", initializer_range=0.2, seed=1)
    tiny_vision_tower_folder(folder / "clip", initializer_range=0.5)
    tiny_vision_tower_folder(folder / "trained_clip", initializer_range=0.5, seed=1)
    tiny_llava_data(folder / "llava.json", folder / "images", count=3)
    rows = [{"conversation": [{"input": "Who?", "output": "I."}]}] * 2
    (folder / "text.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def run(models, tmp_path, monkeypatch):
    for name in ("base", "trained", "clip", "trained_clip", "images"):
        (tmp_path / name).symlink_to(models / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_text_run(run, models, *, deepspeed=False):
    (run / "config.py").write_text(TEXT.format(model="base"))
    (run / "rows.json").write_text((models / "text.json").read_text())
    weights = load_file(models / "trained" / "model.safetensors")
    tensors = {f"llm.{name}": tensor for name, tensor in weights.items()}
    write_pth(run / "iter_5.pth", tensors, deepspeed=deepspeed)
    return weights


@pytest.mark.parametrize("deepspeed", [False, True], ids=["file", "folder"])
def test_a_language_model(models, run, capsys, deepspeed):
    weights = write_text_run(run, models, deepspeed=deepspeed)
    assert main(["convert", "pth_to_hf", "config.py", "iter_5.pth", "hf", "--fp32"]) == 0
    found = load_file("hf/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    words = ["--ask", "1 2 3", "--max-new-tokens", "8", "--dtype", "float32"]
    capsys.readouterr()
    assert main(["chat", "hf", *words]) == 0
    converted = capsys.readouterr().out
    assert main(["chat", "trained", "--prompt-template", "chatml", *words]) == 0
    assert capsys.readouterr().out == converted


def test_a_run_starts_from_a_language_model(models, run, capsys):
    weights = write_text_run(run, models)
    assert main(["train", "config.py", "--work-dir", "work", "--resume", "iter_5.pth"]) == 0
    assert "starts from its weights, at step 0" in capsys.readouterr().out
    found = load_file("work/iter_1/model.safetensors")
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=0, atol=1e-6)


def test_an_internlm2_in_its_own_layout(run):
    base = write_internlm2(run / "internlm2")
    trained = write_internlm2(run / "other", seed=1)
    (run / "config.py").write_text(TEXT.format(model=str(base)))
    weights = load_file(trained / "model.safetensors")
    write_pth(run / "iter_5.pth", {f"llm.{n}": t for n, t in weights.items()}, deepspeed=False)
    assert main(["convert", "pth_to_hf", "config.py", "iter_5.pth", "hf", "--fp32"]) == 0
    torch.testing.assert_close(forward(run / "hf", IDS), forward(trained, IDS), rtol=0, atol=1e-5)
    for name in ("tokenizer.model", "tokenizer_config.json", "modeling_internlm2.py"):
        assert (run / "hf" / name).read_bytes() == (base / name).read_bytes()
    logits = load_model(run / "hf", dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits.detach(), forward(trained, IDS), rtol=0, atol=1e-4)


def write_llava_run(run, models, *, deepspeed=False):
    (run / "config.py").write_text(LLAVA)
    (run / "rows.json").write_text((models / "llava.json").read_text())
    tensors = {
        f"llm.{n}": t for n, t in load_file(models / "trained" / "model.safetensors").items()
    }
    encoder = load_file(models / "trained_clip" / "model.safetensors")
    prefix = "" if next(iter(encoder)).startswith("vision_model.") else "vision_model."
    tensors |= {f"visual_encoder.{prefix}{name}": tensor for name, tensor in encoder.items()}
    generator = torch.Generator().manual_seed(3)
    hidden, width = tensors["llm.model.norm.weight"].shape[0], 32
    for layer, columns in ((0, width), (2, hidden)):
        drawn = torch.randn((hidden, columns), generator=generator) * 0.3
        tensors[f"projector.model.{layer}.weight"] = drawn
        tensors[f"projector.model.{layer}.bias"] = torch.zeros(hidden)
    write_pth(run / "iter_5.pth", tensors, deepspeed=deepspeed)
    return tensors


def parts_of(tensors, run):
    """The same weights in the current layout, next to the trained models."""
    (run / "wanted" / "projector").mkdir(parents=True)
    projector = {
        n.removeprefix("projector."): t for n, t in tensors.items() if n.startswith("projector.")
    }
    torch.save(projector, run / "wanted" / "projector" / "pytorch_model.bin")
    return {"llava": "wanted", "visual_encoder": "trained_clip", "prompt_template": "chatml"}


@pytest.mark.parametrize("deepspeed", [False, True], ids=["file", "folder"])
def test_all_parts_of_llava(models, run, deepspeed):
    tensors = write_llava_run(run, models, deepspeed=deepspeed)
    wanted = answer("trained", "Which?", "images/1.png", **parts_of(tensors, run))
    assert main(["convert", "pth_to_hf", "config.py", "iter_5.pth", "parts", "--fp32"]) == 0
    assert answer("parts", "Which?", "images/1.png") == wanted
    command = ["convert", "pth_to_hf", "config.py", "iter_5.pth", "whole", "--fp32"]
    assert main([*command, "--save-format", "huggingface"]) == 0
    assert answer("whole", "Which?", "images/1.png") == wanted


def test_a_run_starts_from_all_parts_of_llava(models, run, capsys):
    tensors = write_llava_run(run, models)
    wanted = answer("trained", "Which?", "images/1.png", **parts_of(tensors, run))
    assert main(["train", "config.py", "--work-dir", "work", "--resume", "iter_5.pth"]) == 0
    assert "starts from its weights, at step 0" in capsys.readouterr().out
    assert answer("work", "Which?", "images/1.png") == wanted


def test_a_projector_beside_other_weights_is_said(models, run, capsys):
    tensors = write_llava_run(run, models)
    sets = ["--set", "pretrained_pth=iter_5.pth", "freeze_llm=True", "freeze_visual_encoder=True"]
    assert main(["train", "config.py", "--work-dir", "work", *sets]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "iter_5.pth also holds weights of llm, visual_encoder" in said
    assert "--resume iter_5.pth" in said
    found = load_file("work/iter_1/projector/model.safetensors")
    torch.testing.assert_close(
        found["linear_1.weight"], tensors["projector.model.0.weight"], rtol=0, atol=1e-6
    )
