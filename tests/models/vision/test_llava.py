"""LLaVA: parity with transformers, isolation in packs, and where gradients go."""

import re

import numpy as np
import pytest
import torch
from losses import loss_of
from torch import nn

from xtuner.config.builtin import catalog
from xtuner.config.schema import Settings
from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageCollate, ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.errors import ModelError
from xtuner.kernels.attention import packed as attention
from xtuner.models import adapters
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.vision import folder as layout
from xtuner.models.vision import llava
from xtuner.models.vision.image_processor import LlavaImageProcessor
from xtuner.models.vision.tower import add_image_token, num_image_tokens
from xtuner.models.vision.training import make
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.testing.vision import tiny_images, tiny_vision_tower, tiny_vision_tower_folder
from xtuner.types import ImageRef, RowRef, Sample

IMAGE_ID = 261  # beyond the 261 rows of the embedding, as for most models
TOKENS = 4


def assembled(kind="clip", model_type="llama", **options):
    llm = tiny_model(model_type)
    llm.set_attn_implementation(attention.register())
    encoder = tiny_vision_tower(kind)
    model = llava.assemble(llm, encoder, image_token_id=IMAGE_ID, **options).eval()
    return PackedCausalLM(model, embedder=llava.LlavaEmbedder(model))


def sample(ids, *images, supervised=3):
    mask = np.zeros(len(ids), dtype=bool)
    mask[-supervised:] = True
    return Sample(
        np.array(ids), mask, RowRef("a.json", 1), tuple(ImageRef(name, TOKENS) for name in images)
    )


@pytest.fixture
def collate(tmp_path):
    names = tiny_images(tmp_path, 8)
    assert names[:2] == ["0.png", "1.png"]
    encoder = tiny_vision_tower_folder(tmp_path / "clip")
    processor = LlavaImageProcessor.of_tower(str(encoder))
    assert processor.num_tokens((640, 480)) == TOKENS
    return ImageCollate(concatenate, ImageLayout(ImageFolder(tmp_path), IMAGE_ID, processor))


IMAGE = [IMAGE_ID] * TOKENS
SAMPLES = [
    sample([1, *IMAGE, 70, 71, 72, 73], "1.png"),
    sample([1, 60, 61, 62, 63, 64]),
    sample([1, *IMAGE, 80, *IMAGE, 81, 82, 83], "2.png", "3.png"),
]


def upstream_logits(packed, batch):
    """transformers' own forward with an embedding that has a row for the image's token."""
    model = packed.model
    decoder = llava.decoder_of(model)
    decoder.set_attn_implementation("eager")
    before = model.get_input_embeddings()
    grown = nn.Embedding(IMAGE_ID + 1, before.weight.shape[1])
    grown.weight.data[: before.weight.shape[0]] = before.weight.data
    model.set_input_embeddings(grown)
    pixels = torch.stack(batch.images.pixel_values) if batch.images else None
    try:
        return model(input_ids=batch.input_ids, pixel_values=pixels, use_cache=False).logits
    finally:
        model.set_input_embeddings(before)
        decoder.set_attn_implementation(attention.NAME)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_are_those_of_transformers_and_packed_is_unpacked(collate, kind, model_type):
    packed = assembled(kind, model_type)
    assert packed.verify() is None
    batch = collate(SAMPLES)
    with torch.no_grad():
        together = packed.model.lm_head(packed.hidden_states(batch))
        singles = [packed.model.lm_head(packed.hidden_states(b)) for b in batch.split()]
        wanted = [upstream_logits(packed, b) for b in batch.split()]
        losses = [loss_of(packed, b) for b in batch.split()]
        loss = loss_of(packed, batch)
    assert torch.allclose(together, torch.cat(singles, 1), atol=1e-5)
    assert torch.allclose(together, torch.cat(wanted, 1), atol=1e-5)
    assert float(loss) == pytest.approx(float(sum(losses)), rel=1e-5)


def test_another_image_changes_its_own_sample_only(collate):
    packed = assembled()
    other = [SAMPLES[0], SAMPLES[1], sample(SAMPLES[2].input_ids, "2.png", "7.png")]
    with torch.no_grad():
        one, two = (packed.hidden_states(collate(s))[0] for s in (SAMPLES, other))
    assert torch.equal(one[:15], two[:15])
    assert not torch.allclose(one[-1], two[-1])


def test_the_layer_and_cls_are_as_in_the_paper():
    packed = assembled(select_layer=1)
    encoder = packed.model.model.vision_tower
    pixels = torch.randn(2, 3, 28, 28)
    states = encoder(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(packed.embedder.features(pixels), states[1][:, 1:])
    assert num_image_tokens(encoder.config) == TOKENS == packed.embedder.features(pixels).shape[1]
    with pytest.raises(ModelError, match="from -4 to 3"):
        assembled(select_layer=-5)


def test_text_does_not_touch_the_visual_encoder(collate):
    packed = assembled()
    packed.model.model.vision_tower = None
    packed.model.model.multi_modal_projector = None
    assert loss_of(packed, collate([SAMPLES[1]])).isfinite()


def test_a_language_model_that_changes_its_logits_is_refused():
    with pytest.raises(ModelError, match="final_logit_softcapping"):
        llava.assemble(tiny_model("gemma2"), tiny_vision_tower(), image_token_id=IMAGE_ID)


FAMILIES = {
    "smollm2_|internlm2_|internlm3_|llama|yi_|deepseek_r1_distill_llama_": "llama",
    "qwen1_5_|qwen2_|deepseek_r1_distill_qwen_": "qwen2",
    "qwen3_": "qwen3",
    "mistral_": "mistral",
    "mixtral_": "mixtral",
    "gemma2_": "gemma2",
    "gemma3_": "gemma3_text",
    "phi3_": "phi3",
    "deepseek_v2_": "deepseek_v2",
    "glm4_": "glm",
}
"""What the chat models of the catalog are, by the beginnings of their names."""


def test_catalog_has_llava_settings_for_supported_models():
    chat = {n.removesuffix("_lora_custom") for n in catalog.names("*_lora_custom")
            if catalog.compose(n)["prompt_template"] == "auto"}  # fmt: skip
    offered = {n for n in chat if catalog.names(f"llava_{n}_clip_vit_large_p14_336_e1_*")}
    able = set()
    for start, model_type in FAMILIES.items():
        names = {n for n in chat if re.match(start, n)}
        assert names
        chat -= names
        try:
            llava.assemble(tiny_model(model_type), tiny_vision_tower(), image_token_id=IMAGE_ID)
        except ModelError:
            continue
        able |= names
    assert not chat, "give a new family a row above"
    assert offered == able


CASES = {
    "projector": {"tuning": "full", "freeze_llm": True},
    "llm adapters": {"tuning": "lora", "lora_r": 4},
    "both adapters": {"tuning": "lora", "lora_r": 4, "visual_encoder_lora_r": 2},
    "all": {"tuning": "full", "freeze_visual_encoder": False},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_what_the_settings_say(tmp_path, collate, case):
    settings = Settings(
        pretrained_model_name_or_path="-", data_path=("-",), dtype="float32",
        visual_encoder_name_or_path=str(tmp_path / "clip"), **CASES[case],
    )  # fmt: skip
    llm = tiny_model()
    llm.set_attn_implementation(attention.register())
    if settings.uses_adapter:
        llm = adapters.add_adapter(llm, r=4, alpha=8)
    elif settings.llm_training == "frozen":
        llm.requires_grad_(False)
    parts = make(settings, llm, image_token_id=IMAGE_ID, dtype=torch.float32, device="cpu")
    for name, parameter in parts.llava.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)  # a B of zeros lets no gradient through to A
    parts.packed.train()
    loss_of(parts.packed, collate(SAMPLES)).backward()
    reached = {n for n, p in parts.llava.named_parameters() if p.grad is not None}
    trained = {n for n, p in parts.llava.named_parameters() if p.requires_grad}
    nothing = {n for n in reached if not parts.llava.get_parameter(n).grad.abs().sum()}
    assert reached == trained and not {n for n in nothing if "k_proj.bias" not in n}
    where = {n.split(".")[1] if n.startswith("model.") else n.split(".")[0] for n in reached}
    wanted = {"multi_modal_projector"}
    wanted |= {"language_model"} if settings.llm_training != "frozen" else set()
    wanted |= {"lm_head"} if settings.llm_training == "full" else set()
    wanted |= {"vision_tower"} if settings.visual_encoder_training != "frozen" else set()
    assert where == wanted
    if settings.uses_adapter:
        assert all("lora_" in n for n in reached if "multi_modal" not in n)
    assert not any("layers.2." in n for n in reached if "vision_tower" in n)  # after layer -2
    lines = list(parts.table())
    assert len(lines) == 3 and ("frozen" in lines[1]) == (case == "projector")


def test_projectors_of_all_layouts_are_read(tmp_path):
    model = assembled().model
    projector = model.model.multi_modal_projector
    layout.save_projector(model, tmp_path / "iter_1" / "projector")
    old = {f"model.{2 * (int(n[7]) - 1)}.{n[9:]}": p for n, p in projector.state_dict().items()}
    assert set(old) == {"model.0.weight", "model.0.bias", "model.2.weight", "model.2.bias"}
    (tmp_path / "old" / "projector").mkdir(parents=True)
    torch.save(old, tmp_path / "old" / "projector" / "pytorch_model.bin")
    for place in ("iter_1", "iter_1.pth", "iter_1/projector", "old"):
        fresh = assembled(seed=5).model
        assert not torch.equal(
            fresh.model.multi_modal_projector.linear_1.weight, projector.linear_1.weight
        )
        layout.load_projector(fresh, tmp_path / place)
        for name, tensor in projector.state_dict().items():
            assert torch.equal(fresh.model.multi_modal_projector.state_dict()[name], tensor)
    with pytest.raises(ModelError, match="contains no projector"):
        layout.load_projector(model, tmp_path)


def test_the_image_token_is_one_token():
    tokenizer = tiny_tokenizer()
    number = add_image_token(tokenizer)
    assert number == IMAGE_ID == add_image_token(tokenizer)
    assert tokenizer("a<image>b", add_special_tokens=False)["input_ids"][1] == number
