"""The protocol of an image model, with one whose number of tokens depends on the image size."""

import numpy as np
import pytest
import torch
from data_makers import settings, write_jsonl
from losses import loss_of
from PIL import Image

from xtuner import templates
from xtuner.algorithms.sft import Algorithm
from xtuner.data.build import build
from xtuner.data.collate import concatenate
from xtuner.data.images.expansion import ImageCollate, ImageLayout
from xtuner.data.images.files import ImageFolder
from xtuner.errors import DataError
from xtuner.generation.answer import Answer
from xtuner.generation.detokenize import StopWords
from xtuner.generation.generate import GenerationOptions, chooser
from xtuner.generation.images import ImageInput, question
from xtuner.generation.running import OneByOne
from xtuner.models.causal_lm import PackedCausalLM
from xtuner.models.vision.load import VisionLanguageModel
from xtuner.models.vision.tower import add_image_token
from xtuner.testing.tiny import tiny_model, tiny_tokenizer

PATCH, MOST = 8, 12


class PatchImages:
    """A token for each patch of 8 x 8 pixels; its features are the mean colour."""

    max_tokens = MOST

    def num_tokens(self, size):
        return (size[0] // PATCH) * (size[1] // PATCH)

    def preprocess(self, image):
        return np.asarray(image, np.float32).transpose(2, 0, 1) / 255

    def facts(self):
        return {"patch": PATCH}


class PatchEmbedder(torch.nn.Module):
    """All tokens of an image have the position of the first: an image counts as one position."""

    def __init__(self, llm):
        super().__init__()
        self._embedding = (llm.get_input_embeddings(),)
        self.projector = torch.nn.Linear(3, self._embedding[0].weight.shape[1])

    def features(self, pixel_values):
        pool = torch.nn.functional.avg_pool2d
        return [pool(pixels, PATCH).flatten(1).T for pixels in pixel_values]

    def embed(self, input_ids, images):
        vectors = self._embedding[0](input_ids.masked_fill(images.mask, 0))
        given = [feature for feature in images.features if feature is not None]
        projected = self.projector(torch.cat(given or self.features(images.pixel_values)))
        return vectors.masked_scatter(images.mask[..., None], projected)

    def positions(self, batch):
        inside = batch.images.mask[0] & torch.roll(batch.images.mask[0], 1)
        starts = batch.cu_seqlens[:-1].repeat_interleave(batch.cu_seqlens.diff()).long()
        steps = (~inside).long().cumsum(0)
        return (steps - steps[starts])[None]


@pytest.fixture
def made(tmp_path):
    """Rows with images of 2, 6 and 12 tokens and one of text, packed; and their collation."""
    for name, size in (("a", (16, 8)), ("b", (16, 24)), ("c", (24, 32))):
        Image.new("RGB", size, (200, len(name), 7)).save(tmp_path / f"{name}.png")
    rows = [
        {"image": f"{name}.png", "conversations": [{"from": "human", "value": "<image>What?"},
                                                   {"from": "gpt", "value": f"It is {name}."}]}
        for name in "abc"
    ]  # fmt: skip
    rows.append({"conversations": [{"from": "human", "value": "What?"},
                                   {"from": "gpt", "value": "It is a."}]})  # fmt: skip
    own = tiny_tokenizer()
    layout = ImageLayout(ImageFolder(tmp_path), add_image_token(own), PatchImages())
    data = build(
        settings(write_jsonl(tmp_path / "d.jsonl", rows), max_length=400, shuffle=False),
        template=templates.load("auto", own), tokenizer=own, folder=tmp_path, quiet=True,
        image_layout=layout, algorithm=Algorithm(),
    )  # fmt: skip
    return data.train, ImageCollate(concatenate, layout)


def test_tokens_follow_the_size_through_layout_packs_and_a_forward_pass(made):
    packs, collate = made
    (samples,) = list(packs)
    assert [image.num_tokens for s in samples for image in s.images] == [2, 6, 12]
    lengths = [len(sample.input_ids) for sample in samples]
    assert [n - lengths[3] for n in lengths[:3]] == [2, 6, 12]
    batch = collate(samples)
    assert batch.images.sizes == ((16, 8), (16, 24), (24, 32)) and sum(lengths) == batch.num_tokens

    llm = tiny_model()
    model = PackedCausalLM(llm, embedder=PatchEmbedder(llm))
    alone = torch.stack([loss_of(model, one) for one in batch.split()])
    together = loss_of(model, batch)
    assert float(together.detach()) == pytest.approx(float(alone.detach().sum()), rel=1e-4)
    together.backward()
    assert model.embedder.projector.weight.grad.abs().sum() > 0
    positions = model.embedder.positions(batch)[0]
    assert int(positions.max()) == lengths[3]  # an image counts as one position


def test_an_image_of_another_size_than_when_data_were_prepared_is_named(made, tmp_path):
    packs, collate = made
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (samples,) = list(packs)
    with pytest.raises(DataError, match=r"line 2: image 'b.png' takes 1 token, but took 6"):
        collate(samples)


def test_generation_continues_the_positions_of_the_image_model(made, tmp_path):
    layout = made[1].image_layout
    llm = tiny_model(initializer_range=0.5).eval()
    embedder = PatchEmbedder(llm)
    vision = ImageInput(VisionLanguageModel(llm, embedder, layout.processor, layout.token_id))
    asked = [question("What?", [str(tmp_path / "c.png")])]
    own = tiny_tokenizer()
    add_image_token(own)
    prompt = vision.expanded(templates.load("auto", own).prompt_ids(asked), asked)
    assert prompt.count(layout.token_id) == 12
    inputs = vision.inputs(prompt, asked)
    row = Answer(
        prompt,
        tokenizer=own,
        words=StopWords(()),
        ends=frozenset(),
        limit=5,
        choose=chooser(GenerationOptions(), torch.device("cpu")),
        inputs=inputs,
    )
    batch = OneByOne(llm)
    batch.admit([row])
    while batch.rows:
        batch.step()
    embeds, positions = inputs["inputs_embeds"], inputs["position_ids"]
    for token_id in row.ids[len(prompt) :]:
        mask = torch.ones(positions.shape, dtype=torch.int64)  # or transformers reads packed rows
        logits = llm(
            inputs_embeds=embeds, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits
        assert int(logits[0, -1].argmax()) == token_id
        embeds = torch.cat([embeds, llm.get_input_embeddings()(torch.tensor([[token_id]]))], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
