"""LLaVA on two processes under every strategy: the numbers of one process, also in a step without
images, which leaves the weights for images unchanged."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import end_of, runs, scalars

from xtuner.parallel.processes import Processes
from xtuner.testing.run_distributed import run_distributed
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = """
llm_name_or_path = {model!r}
visual_encoder_name_or_path = {clip!r}
data_path = "data.json"
image_folder = {images!r}
prompt_template = "chatml"
max_length = 96
accumulative_counts = 2
max_steps = 5
max_epochs = 1
dtype = "float32"
lr = 1e-2
lr_schedule = "constant"
warmup_ratio = 0.0
weight_decay = 0.1
tuning = {tuning!r}
lora_r = 4
lora_dropout = 0.0
freeze_visual_encoder = {frozen}
visual_encoder_lora_r = {rank}
pack_to_max_length = False
shuffle = False
group_by_modality = False
tensorboard = False
num_threads = 1
"""
WITH_IMAGE = (1, 1, 0, 0, 1, 0, 0, 1, 0, 0)
"""Rows, two a step: the second and the last step have no image, the third and fourth one each."""
STRATEGIES = ("replicated", "fsdp2", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
TUNINGS = {
    "full": {"tuning": "full", "frozen": False, "rank": None},
    "lora": {"tuning": "lora", "frozen": True, "rank": 4},
    "qlora": {"tuning": "qlora", "frozen": True, "rank": None},
}


def prepare(folder, model):
    tiny_vision_tower_folder(folder / "clip", initializer_range=0.5)
    names = tiny_images(folder / "images", len(WITH_IMAGE))
    rows = []
    for number, (name, image) in enumerate(zip(names, WITH_IMAGE, strict=True)):
        question = f"{'<image>' if image else 'No image.'}\nWhich number is this?"
        turns = [{"from": "human", "value": question}]
        turns.append({"from": "gpt", "value": f"Number {number}." * (1 + number % 2)})
        rows.append({**({"image": name} if image else {}), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, settings in TUNINGS.items():
        paths = {"model": model, "clip": folder / "clip", "images": folder / "images"}
        text = SETTINGS.format(**{key: str(path) for key, path in paths.items()}, **settings)
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def strategies_of(tuning):
    return [name for name in STRATEGIES if (tuning, name) != ("qlora", "fsdp2")]


def test_every_strategy_gives_the_numbers_of_one_process(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    prepare(tmp_path, tiny_model_path)
    cases = [
        (f"{tuning}.py", f"{tuning}_{strategy}", [f"strategy={strategy}", "accumulative_counts=1"])
        for tuning in TUNINGS
        for strategy in strategies_of(tuning)
    ]
    first, second = run_distributed(runs, tmp_path, cases, timeout=500)
    assert first == second == [5] * len(cases)
    for tuning in TUNINGS:
        alone = f"{tuning}_alone"
        assert end_of(Processes("cpu"), tmp_path, f"{tuning}.py", alone) == 5
        expected = scalars(tmp_path / alone)
        for strategy in strategies_of(tuning):
            found = scalars(tmp_path / f"{tuning}_{strategy}")
            for step, values in expected.items():
                for name in ("loss", "grad_norm"):
                    close = pytest.approx(values[name], rel=1e-5)
                    assert found[step][name] == close, (tuning, strategy, step, name)
    for strategy in strategies_of("full"):
        assert_complete(tmp_path, f"full_{strategy}")


def assert_complete(folder, work):
    """The vision tower is saved with its last layer, which is not trained."""
    first = load_file(folder / "clip" / "model.safetensors")
    saved, expected = (
        load_file(folder / name / "iter_5" / "visual_encoder" / "model.safetensors")
        for name in (work, "full_alone")
    )
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in expected.items()}
    frozen = [name for name in first if torch.equal(first[name], expected[name])]
    assert any("layers.2." in name for name in frozen)
    assert all(torch.equal(saved[name], first[name]) for name in frozen), work
