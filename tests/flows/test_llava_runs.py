"""Runs with images on tiny models: broken images, rows without images, invalid settings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner.cli.app import main
from xtuner.testing.vision import tiny_images, tiny_llava_data, tiny_vision_tower_folder

SPOILER = """
from pathlib import Path
from xtuner.engine.hooks.base import BaseHook

class Spoil(BaseHook):
    def on_start(self, run):
        name = Path("spoilt").read_text()
        Path("images", name).write_bytes(Path("images", name).read_bytes()[:-30])
"""
SETTINGS = """
llm_name_or_path = {model!r}
visual_encoder_name_or_path = "clip"
data_path = "data.json"
image_folder = "images"
prompt_template = "chatml"
max_length = 96
accumulative_counts = 1
max_epochs = 1
dtype = "float32"
lr = 1e-2
tuning = "full"
freeze_llm = True
pack_to_max_length = False
shuffle = False
group_by_modality = False
tensorboard = False
num_threads = 1
"""


@pytest.fixture
def workshop(tmp_path, tiny_model_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vision_tower_folder(tmp_path / "clip", initializer_range=0.5)
    tiny_llava_data(tmp_path / "data.json", tmp_path / "images", count=8)
    (tmp_path / "run.py").write_text(SETTINGS.format(model=str(tiny_model_path)))
    (tmp_path / "spoil.py").write_text(SPOILER)
    return tmp_path


def train(*settings, work_dir="w"):
    words = [word for setting in settings for word in ("--set", setting)]
    return main(["train", "run.py", "--work-dir", work_dir, *words])


def scalars(work_dir="w"):
    (file,) = Path(work_dir).glob("*/scalars.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_becomes_unreadable_loses_no_step(workshop, capsys, workers):
    (workshop / "spoilt").write_text("5.png")
    spoil = "custom_hooks=['spoil.py:Spoil']"
    assert train(spoil, f"dataloader_num_workers={workers}") == 2
    told = capsys.readouterr().err
    assert "data.json row 6: image '5.png' is damaged" in told
    assert told.strip().endswith("restore the file; step 5 is saved, continue with --resume")
    assert "Traceback" not in told
    assert (workshop / "w" / "last_checkpoint").read_text().strip() == "iter_5"


def test_resume_is_not_suggested_without_a_checkpoint(workshop, capsys):
    (workshop / "spoilt").write_text("0.png")
    assert train("custom_hooks=['spoil.py:Spoil']") == 2
    told = capsys.readouterr().err
    assert "data.json row 1: image '0.png'" in told and "--resume" not in told
    assert not list((workshop / "w").glob("iter_*"))


def launched(*settings, work_dir):
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "xtuner.cli.app", "train", "run.py", "--nproc", "2"]
    return subprocess.run(
        [*command, "--work-dir", work_dir, *words],
        env=dict(os.environ), capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.mark.distributed
def test_an_image_of_one_process_that_goes_bad_stops_all_and_loses_no_step(workshop):
    (workshop / "spoilt").write_text("5.png")  # a row of the second process, in step 3
    ended = launched("custom_hooks=['spoil.py:Spoil']", work_dir="w")
    assert ended.returncode == 2, ended.stderr
    assert "data.json row 6: image '5.png' is damaged" in ended.stderr
    assert "step 2 is saved" in ended.stderr and "Traceback" not in ended.stderr
    assert (workshop / "w" / "last_checkpoint").read_text().strip() == "iter_2"


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write(rows):
    Path("data.json").write_text(json.dumps(rows))


def said(capsys):
    out = capsys.readouterr()
    return out.out + out.err


@pytest.mark.parametrize("name", ["auto", "sharegpt", "llava"])
def test_rows_of_text_may_come_first(workshop, capsys, name):
    text = [{"conversations": turns(f"Say {i}", f"{i}.")} for i in range(120)]
    seen = [{"image": "1.png", "conversations": turns(f"<image>{i}?", "Yes.")} for i in range(9)]
    write(text + seen)
    command = ["check-custom-dataset", "run.py", "--set", f"dataset_format='{name}'"]
    assert main(command) == 0, said(capsys)
    assert "No bad rows." in said(capsys)


def test_a_projector_alone_needs_images(workshop, capsys):
    write([{"conversations": turns(f"Say {i}", f"{i}.")} for i in range(12)])
    assert train() == 2
    assert "no row has an image and the language model is frozen" in said(capsys)
    adapters = ("tuning='lora'", "freeze_llm=False", "lora_r=4", "max_steps=1")
    assert train(*adapters, work_dir="lora") == 0
    assert "Note: no row has an image" in said(capsys)


def test_misspelled_key_is_read_with_a_note(workshop, capsys):
    rows = json.loads(Path("data.json").read_text())
    write([{**row, "conversation": row.pop("conversations")} for row in rows])
    assert main(["check-custom-dataset", "run.py"]) == 0
    told = said(capsys)
    assert "Note: data.json: the key 'conversation' is read as 'conversations'" in told


@pytest.mark.parametrize("mended", [3, 27])
def test_repaired_image_is_detected(workshop, capsys, mended):
    """There are more bad rows than a report stores."""
    write([{"image": f"new{i}.png", "conversations": turns("<image>?", "Y.")} for i in range(30)])
    command = ["check-custom-dataset", "run.py"]
    assert main(command) == 2
    assert "30 bad rows" in said(capsys)
    tiny_images("more", 1)
    Path("more/0.png").rename(f"images/new{mended}.png")
    assert train("max_epochs=1", "max_lost_rows=1") == 0
    assert "29 rows lost" in said(capsys)


@pytest.mark.distributed
def test_two_processes_equal_one_also_in_steps_of_text(workshop):
    """A step of text reaches no weight of a projector that alone is trained; nor, in the second
    half of another, one of the processes."""
    image = [True, True, False, False, True, False, False, True, True, True]
    write(
        [
            {"image": f"{i % 8}.png", "conversations": turns(f"<image>{i}?", f"It is {i}.")}
            if seen
            else {"conversations": turns(f"{i}?", f"It is {i}.")}
            for i, seen in enumerate(image)
        ]
    )
    assert train("accumulative_counts=2", work_dir="one") == 0
    ended = launched(work_dir="two")
    assert ended.returncode == 0, ended.stderr
    one, two = ([line.get("loss") for line in scalars(work_dir)] for work_dir in ("one", "two"))
    assert len([loss for loss in one if loss]) == 5
    assert one == pytest.approx(two, abs=1e-5)


def test_a_resume_needs_no_projector_to_start_from(workshop, capsys):
    assert train("max_steps=2", work_dir="first") == 0
    start = ("max_steps=2", "pretrained_pth='first'")
    assert train(*start) == 0
    Path("first").rename("gone")
    words = [word for setting in start for word in ("--set", setting)]
    again = ["train", "run.py", "--work-dir", "w", *words, "--set", "max_steps=3", "--resume"]
    assert main(again) == 0, said(capsys)
    assert (workshop / "w" / "last_checkpoint").read_text().strip() == "iter_3"
    assert train(*start, work_dir="anew") == 2
    assert "pretrained_pth = 'first'" in said(capsys)


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        (["shuffle=False", "batch_size=2"], True),
        (["shuffle=True", "batch_size=1"], True),
        (["shuffle=True", "batch_size=2"], False),
        (["shuffle=True", "batch_size=1", "pack_to_max_length=True"], False),
    ],
)
def test_grouping_without_effect_is_noted(workshop, capsys, changes, idle):
    assert train(*changes, "max_steps=1", "group_by_modality=True") == 0
    assert ("without effect in this run: group_by_modality" in said(capsys)) is idle


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["visual_select_layer=-9"], "has 3 layers, so it must be from -4 to 3"),
        (["visual_select_layer=4"], "has 3 layers, so it must be from -4 to 3"),
        (["visual_select_layer=0", "visual_encoder_lora_r=2"], "no layer of the vision tower is"),
        (
            ["visual_select_layer=-4", "visual_encoder_lora_r=2"],
            "no layer of the vision tower is",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_missing_layer_is_rejected(workshop, capsys, settings, words, dry):
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert main(["train", "run.py", "--work-dir", "w", *arguments, *dry]) == 2
    assert words in said(capsys)


def test_layer_0_can_be_used_without_adapters(workshop):
    assert train("visual_select_layer=0", "max_steps=1") == 0


@pytest.mark.parametrize("damage", ["cut off", "nothing", "no weights", "pickle"])
def test_a_damaged_encoder_is_named(workshop, capsys, damage):
    file = Path("clip/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(
        {"cut off": whole[:-99], "nothing": b"", "no weights": b"x" * 999, "pickle": b""}[damage]
    )
    if damage == "pickle":
        file.unlink()
        Path("clip/pytorch_model.bin").write_bytes(whole[:500])
    assert train("max_steps=1") == 2
    told = capsys.readouterr().err
    assert told.lstrip(".\n").startswith("ModelError: cannot load the vision tower 'clip'"), told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "must be a JSON object"),
        ("{", "cannot be read"),
        (
            '{"image_mean": [0.5, 0.5]}',
            "image_mean is [0.5, 0.5] and must be three non-negative numbers",
        ),
        ('{"image_std": [0, 1, 1]}', "image_std is [0, 1, 1] and must be three positive"),
        ('{"resample": "bicubic"}', "resample is 'bicubic' and must be a number from 0 to 5"),
        ('{"rescale_factor": "1/255"}', "rescale_factor is '1/255' and must be a positive number"),
    ],
)
def test_invalid_preprocessor_config_is_reported(workshop, capsys, text, words):
    Path("clip/preprocessor_config.json").write_text(text)
    assert train("max_steps=1") == 2
    told = said(capsys)
    assert "preprocessor_config.json" in told and words in told
