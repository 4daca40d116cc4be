"""The second exercise of the course, with its own commands: LLaVA from the projector it hands out.

Paths, the sizes of the models and the words of the conversations differ; numbers, names, commands
and edits are those of the course.
"""

import json
import shlex
import subprocess
import sys

import pytest
import torch
from internlm2_maker import Shape, write_internlm2
from test_course import edit

from xtuner.cli.app import main
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder

FINETUNE = "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"
PRETRAIN = "llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain"
SHAPE = Shape(positions=2048)
CLIP_WIDTH = 32
REPEAT = """
import argparse, json
parser = argparse.ArgumentParser()
for name, kind in (("-i", str), ("-o", str), ("-n", int)):
    parser.add_argument(name, type=kind)
given = parser.parse_args()
rows = json.load(open(given.i, encoding="utf-8"))
json.dump(rows * given.n, open(given.o, "w", encoding="utf-8"), ensure_ascii=False, indent=4)
"""
QUESTIONS = ["Describe this image.", "What is the equipment in the image?", "What is it for?"]
ANSWERS = ["A patient looks into a device.", "It is a phoropter.", "It measures eyes."]


def rows():
    """Six conversations about one image, as in the course's unique_data.json."""
    for number in range(6):
        turns = []
        for index in range(len(QUESTIONS)):
            chosen = (index + number) % len(QUESTIONS)
            image = "<image>\n" if index == 0 else ""
            turns += [
                {"from": "human", "value": f"{image}{QUESTIONS[chosen]}"},
                {"from": "gpt", "value": ANSWERS[chosen]},
            ]
        yield {"id": "123456789", "image": "test_img/oph.jpg", "conversations": turns}


def write_projector(path):
    """The projector of a pretraining, as XTuner 0.1 saved it."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer, columns in ((0, CLIP_WIDTH), (2, SHAPE.hidden)):
        drawn = torch.randn((SHAPE.hidden, columns), generator=generator) * 0.2
        tensors[f"projector.model.{layer}.weight"] = drawn
        tensors[f"projector.model.{layer}.bias"] = torch.zeros(SHAPE.hidden)
    torch.save({"meta": {"iter": 2181}, "state_dict": tensors}, path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The contents of /root on the course's machines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    shared = tmp_path / "share" / "new_models"
    write_internlm2(shared / "Shanghai_AI_Laboratory" / "internlm2-chat-1_8b", shape=SHAPE)
    tiny_vision_tower_folder(shared / "openai" / "clip-vit-large-patch14-336")
    (shared / "xtuner").mkdir()
    write_projector(shared / "xtuner" / "iter_2181.pth")
    data = tmp_path / "tutorial" / "xtuner" / "llava" / "llava_data"
    (name,) = tiny_images(data / "test_img", 1)
    (data / "test_img" / name).rename(data / "test_img" / "oph.jpg")
    (data / "unique_data.json").write_text(json.dumps([*rows()]), encoding="utf-8")
    (data / "repeat.py").write_text(REPEAT)
    return tmp_path


def xtuner(command, root, *more):
    """Run a command of the course, whose paths begin with /root."""
    words = shlex.split(command.replace("/root", str(root)).replace("\\\n", " "))
    assert main([*words[1:], *more]) == 0, command


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_second_exercise(root, monkeypatch, capsys):
    pytest.importorskip("deepspeed")
    llava = root / "tutorial" / "xtuner" / "llava"
    repeat = [sys.executable, "repeat.py", "-i", "unique_data.json", "-o", "repeated_data.json"]
    subprocess.run([*repeat, "-n", "200"], cwd=llava / "llava_data", check=True)

    xtuner("xtuner list-cfg -p llava_internlm2_chat_1_8b", root)
    assert capsys.readouterr().out.splitlines()[:2] == [PRETRAIN, FINETUNE]
    xtuner(f"xtuner copy-cfg {FINETUNE} /root/tutorial/xtuner/llava", root)
    config = llava / f"{FINETUNE}_copy.py"
    models = root / "share" / "new_models"
    edit(
        config,
        llm_name_or_path=str(models / "Shanghai_AI_Laboratory" / "internlm2-chat-1_8b"),
        visual_encoder_name_or_path=str(models / "openai" / "clip-vit-large-patch14-336"),
        pretrained_pth=str(models / "xtuner" / "iter_2181.pth"),
        data_root=f"{llava}/llava_data/",
        batch_size=1,
        evaluation_inputs=["Please describe this picture", "What is the equipment in the image?"],
    )
    text = config.read_text(encoding="utf-8")
    for old, new in (
        ("data_path = 'LLaVA-Instruct-150K/llava_v1_5_mix665k.json'",
         "data_path = data_root + 'repeated_data.json'"),
        ("image_folder = 'llava_images'", "image_folder = data_root"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    config.write_text(text, encoding="utf-8")

    monkeypatch.chdir(llava)
    limits = ["--set", "evaluation_max_new_tokens=4", "num_threads=1", "tensorboard=False"]
    train = f"xtuner train /root/tutorial/xtuner/llava/{FINETUNE}_copy.py"
    xtuner(f"{train} --deepspeed deepspeed_zero2", root, *limits)
    work_dir = llava / "work_dirs" / f"{FINETUNE}_copy"
    saved = sorted(p.name for p in work_dir.glob("iter_*.pth"))
    assert saved == ["iter_1000.pth", "iter_1200.pth"]  # 1,200 rows; save_total_limit is 2
    (log,) = work_dir.glob("*/scalars.jsonl")
    losses = [
        line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line
    ]
    assert losses[-1] < losses[0] / 2
    capsys.readouterr()

    monkeypatch.setenv("MKL_SERVICE_FORCE_INTEL", "1")
    monkeypatch.setenv("MKL_THREADING_LAYER", "GNU")
    answers = []
    for given, pth, folder in (
        (PRETRAIN, "/root/share/new_models/xtuner/iter_2181.pth", "iter_2181_hf"),
        (str(config), f"{work_dir}/iter_1200.pth", "iter_1200_hf"),
    ):
        out = f"/root/tutorial/xtuner/llava/llava_data/{folder}"
        xtuner(f"xtuner convert pth_to_hf \\\n  {given} \\\n  {pth} \\\n  {out}", root)
        capsys.readouterr()
        chat = f"""xtuner chat /root/share/new_models/Shanghai_AI_Laboratory/internlm2-chat-1_8b \\
          --visual-encoder /root/share/new_models/openai/clip-vit-large-patch14-336 \\
          --llava {out} \\
          --prompt-template internlm2_chat \\
          --image /root/tutorial/xtuner/llava/llava_data/test_img/oph.jpg"""
        xtuner(chat, root, "--ask", QUESTIONS[1], "--max-new-tokens", "24")
        said = capsys.readouterr()
        assert "but is used with" not in said.err  # internlm/... is the folder of that name
        answers.append(said.out.strip())
    before, after = answers
    assert ANSWERS[1] not in before
    assert after == ANSWERS[1]
