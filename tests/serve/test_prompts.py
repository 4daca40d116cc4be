"""The ids of a prompt are the beginning of those that training saw."""

import base64

import pytest
from parts_maker import answer, write_parts_of

from xtuner.data.tokenize.row_encoder import Encoder
from xtuner.errors import DataError
from xtuner.serve.models import open_models
from xtuner.serve.prompts import ImageStore, messages_of, prompt_ids, text_ids
from xtuner.serve.requests import ChatMessage
from xtuner.testing.tiny import tiny_model_folder
from xtuner.testing.vision import tiny_images, tiny_vision_tower_folder
from xtuner.types import Conversation, Message, Text

TURNS = [
    {"role": "developer", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
    {"role": "assistant", "content": "Ada."},
    {"role": "user", "content": "And now? <|im_end|>"},
]


@pytest.mark.parametrize("name", ["tiny", "tiny:ada", "tiny:bob"])
def test_a_conversation(server, name, tmp_path):
    served = server.model(name)
    turns = [ChatMessage(**turn) for turn in TURNS]
    messages = messages_of(turns, served, ImageStore(tmp_path))
    ids = prompt_ids(served, messages)
    done = Conversation((*messages, Message("assistant", "Still Ada.")))
    trained = served.template.encode(done).input_ids
    assert trained[: len(ids)] == ids and len(trained) > len(ids)
    asked = server.client.chat.completions.create(model=name, messages=TURNS, max_tokens=1)
    assert asked.usage.prompt_tokens == len(ids)


def test_a_text(server):
    served = server.model("tiny")
    text = "Ships sail.\nThe sea is 广阔."
    encoder = Encoder.__new__(Encoder)
    object.__setattr__(encoder, "tokenizer", served.tokenizer)
    trained = Encoder.text(encoder, Text(text + " And so on.")).input_ids
    ids = text_ids(served, text)
    assert trained[: len(ids)] == ids
    with pytest.raises(DataError, match="outside the vocabulary"):
        text_ids(served, [1, 100_000])


def data_url(path):
    with open(path, "rb") as file:
        return "data:image/png;base64," + base64.b64encode(file.read()).decode()


def test_an_image(tmp_path, start_server):
    llm = tiny_model_folder(tmp_path / "llm", initializer_range=0.3)
    encoder = tiny_vision_tower_folder(tmp_path / "clip")
    parts = write_parts_of(tmp_path / "parts", llm, encoder)
    name, other = tiny_images(tmp_path / "images", 2)
    paths = [tmp_path / "images" / each for each in (name, other)]
    models = open_models(str(parts), dtype="float32")
    with start_server(models, max_body=10_000_000) as server:

        def ask(*images):
            content = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
            content.append({"type": "text", "text": "What is this?"})
            return server.client.chat.completions.create(
                model="parts",
                messages=[{"role": "user", "content": content}],
                max_tokens=8,
                temperature=0,
            )

        seen = [ask(path) for path in paths]
        texts = [response.choices[0].message.content for response in seen]
        assert texts == [answer(parts, "What is this?", str(path)) for path in paths]
        assert ask(*paths).usage.prompt_tokens > seen[0].usage.prompt_tokens > 9
