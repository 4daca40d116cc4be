"""The shapes of CLIP ViT-L/14-336 with random weights: 576 tokens per image, in every stage."""

import pytest
import torch

from xtuner.chat.opening import open_chat
from xtuner.cli.app import main
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.images import question
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_llava_data, tiny_vision_tower

SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
SETTINGS = """
llm_name_or_path = "model"
visual_encoder_name_or_path = "clip"
data_path = "data.json"
image_folder = "images"
prompt_template = "chatml"
max_length = 1472
pack_to_max_length = False
tuning = "qlora"
lora_r = 8
visual_encoder_lora_r = 64
visual_encoder_lora_alpha = 16
visual_encoder_lora_dropout = 0.05
batch_size = 2
accumulative_counts = 1
max_steps = 2
dataloader_num_workers = 1
"""


@pytest.mark.slow
def test_step_save_resume_chat_merge(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    tiny_model_folder("model", max_position_embeddings=4096)
    tiny_vision_tower(**SHAPE).to(torch.bfloat16).save_pretrained("clip")
    tiny_llava_data(tmp_path / "data.json", tmp_path / "images", count=6)
    (tmp_path / "run.py").write_text(SETTINGS, encoding="utf-8")
    assert main(["train", "run.py", "--work-dir", "run"]) == 0
    assert "576 tokens each" in capsys.readouterr().out
    longer = ["train", "run.py", "--work-dir", "run", "--resume", "--set", "max_steps=3"]
    assert main(longer) == 0
    folder = tmp_path / "run" / "iter_3"
    assert (folder / "visual_encoder_adapter" / "adapter_config.json").is_file()
    session = open_chat("run", options=GenerationOptions(max_new_tokens=3, temperature=0))
    image = session.tokenizer.convert_tokens_to_ids("<image>")
    about = [question("", ["images/1.png"])]
    assert len(session.vision.expanded([image], about)) == 576
    "".join(session.ask("Which number is this?", ["images/1.png"]))
    merged = ["convert", "merge", "clip", str(folder / "visual_encoder_adapter"), "merged"]
    assert main([*merged, "--is-clip"]) == 0
    whole = ["convert", "pth_to_hf", "run.py", "run", "whole", "--save-format", "huggingface"]
    assert main(whole) == 0
    session = open_chat("whole", options=GenerationOptions(max_new_tokens=3, temperature=0))
    features = session.vision.inputs([image] * 576, about)
    assert features["inputs_embeds"].isfinite().all()
    "".join(session.ask("Which number is this?", ["images/1.png"]))
