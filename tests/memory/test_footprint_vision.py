"""The memory of a step with images, measured on meta tensors, against the same step on real
tensors."""

import numpy as np
import pytest
import torch
from losses import loss_of

from xtuner.config.schema import Settings
from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageCollate, ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.memory import footprint, step
from xtuner.memory.footprint_vision import measure_vision
from xtuner.memory.live_bytes import LiveBytes
from xtuner.models.prepare import make_trainable
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.training import make
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder
from xtuner.types import ImageRef, RowRef, Sample

IMAGE_ID, SIZES = 261, {"hidden_size": 64, "intermediate_size": 256, "image_size": 112}
CASES = {
    "projector": {"tuning": "full", "freeze_llm": True},
    "both adapters": {"tuning": "lora", "lora_r": 8, "visual_encoder_lora_r": 8},
    "all": {"tuning": "full", "freeze_visual_encoder": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny_model_folder(folder / "llm", hidden_size=64, intermediate_size=128)
    tiny_vision_tower_folder(folder / "clip", **SIZES)
    tiny_images(folder / "images", 6)
    return folder


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_real_step(folder, case, accumulate):
    settings = Settings(
        pretrained_model_name_or_path=str(folder / "llm"), data_path=("-",), dtype="float32",
        visual_encoder_name_or_path=str(folder / "clip"),
        accumulative_counts=1 + accumulate, **CASES[case],
    )  # fmt: skip
    processor = LlavaImageProcessor.of_tower(str(folder / "clip"))
    each, text, images = processor.max_tokens, 60, 6
    assert each == 64
    how = {"dtype": torch.float32, "recompute": False}
    found = measure_vision(settings, images=images, width=64, dtype=torch.float32).beside(
        footprint.measure(settings, tokens=(each + text,) * images, **how), accumulate=accumulate
    )

    llm = make_trainable(settings, device="cpu", **how)
    parts = make(settings, llm, image_token_id=IMAGE_ID, dtype=torch.float32, device="cpu")
    parts.packed.train()
    image_layout = ImageLayout(ImageFolder(folder / "images"), IMAGE_ID, processor)
    collate = ImageCollate(concatenate, image_layout)
    ids = np.array([*[IMAGE_ID] * each, *range(text)])
    mask = np.arange(len(ids)) >= each
    samples = [
        Sample(ids, mask, RowRef("a.json", 1), (ImageRef(f"{number}.png", each),))
        for number in range(images)
    ]
    batch = collate(samples)
    real = [p for p in parts.llava.parameters() if p.requires_grad]
    if accumulate:
        loss_of(parts.packed, batch).backward()
    earlier = sum(p.grad.nbytes for p in real if p.grad is not None)
    with step._separate_caches():
        counter = LiveBytes()
        with counter:
            loss_of(parts.packed, batch).backward()
    peak = max(counter.history) + sum(p.nbytes for p in batch.images.pixel_values) + earlier
    assert found.trainable == sum(p.numel() for p in real)
    assert found.weights == sum(p.nbytes for p in parts.llava.parameters())
    assert abs(found.step - peak) < 0.15 * peak
