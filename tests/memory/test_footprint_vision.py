"""The memory of a step with images, found on shapes alone, against the same step on tensors."""

import numpy as np
import pytest
import torch
from losses import loss_of

from xtuner.config.schema import Settings
from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageCollate, ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.kernels.attention import packed as attention
from xtuner.kernels.fused import norm_mlp
from xtuner.memory import footprint
from xtuner.memory.footprint_vision import measure_vision, tokens_each
from xtuner.memory.live_bytes import LiveBytes
from xtuner.models import adapters
from xtuner.models.load import load_model
from xtuner.models.vision import parts as llava_parts
from xtuner.models.vision.tower import Processor
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder
from xtuner.types import RowRef, Sample

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
        visual_encoder_name_or_path=str(folder / "clip"), **CASES[case],
    )  # fmt: skip
    each, text, images = tokens_each(str(folder / "clip")), 60, 6
    assert each == 64
    lora = {"r": 8, "alpha": 16} if settings.uses_adapter else None
    found = measure_vision(settings, images=images, width=64, dtype=torch.float32).beside(
        footprint.measure(
            str(folder / "llm"), tokens=(each + text,) * images, dtype=torch.float32, lora=lora,
            frozen=settings.llm_training == "frozen", sees=True, accumulate=accumulate,
        ),
        accumulate=accumulate,
    )  # fmt: skip

    attention.register()
    llm = load_model(folder / "llm", dtype=torch.float32, attn_implementation=attention.NAME)
    norm_mlp.install(llm)
    llm = adapters.add_adapter(llm, **lora) if lora else llm
    parts = llava_parts.make(
        settings, llm, image_token_id=IMAGE_ID, dtype=torch.float32, device="cpu"
    )
    parts.packed.train()
    image_layout = ImageLayout(ImageFolder(folder / "images"), IMAGE_ID, each)
    collate = ImageCollate(concatenate, image_layout, Processor(str(folder / "clip")))
    ids = np.array([*[IMAGE_ID] * each, *range(text)])
    mask = np.arange(len(ids)) >= each
    samples = [
        Sample(ids, mask, RowRef("a.json", 1), (f"{number}.png",)) for number in range(images)
    ]
    batch = collate(samples)
    real = [p for p in parts.llava.parameters() if p.requires_grad]
    if accumulate:
        loss_of(parts.packed, batch).backward()
    earlier = sum(p.grad.nbytes for p in real if p.grad is not None)
    with footprint._caches_apart():
        counter = LiveBytes()
        with counter:
            loss_of(parts.packed, batch).backward()
    peak = max(counter.history) + batch.images.pixel_values.nbytes + earlier
    assert found.trainable == sum(p.numel() for p in real)
    assert found.weights == sum(p.nbytes for p in parts.llava.parameters())
    assert abs(found.step - peak) < 0.15 * peak
