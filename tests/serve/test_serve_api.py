"""The OpenAI API, used with OpenAI's client."""

import threading

import openai
import pytest

from xtuner.chat.opening import open_chat
from xtuner.generation.generate import GenerationOptions
from xtuner.generation.running import RunningBatch

WHO = [{"role": "user", "content": "Who are you?"}]
NAMES = ["tiny", "tiny:ada", "tiny:bob"]


def chat(server, model="tiny", messages=WHO, **options):
    options = {"temperature": 0, "max_tokens": 12, **options}
    return server.client.chat.completions.create(model=model, messages=messages, **options)


def text_of(response):
    return response.choices[0].message.content


def test_models_are_the_base_and_its_adapters(server):
    assert [model.id for model in server.client.models.list()] == NAMES
    assert server.client.models.retrieve("tiny:ada").owned_by == "xtuner"


@pytest.mark.parametrize(
    ("name", "folder"), [("tiny", "tiny"), ("tiny:ada", "ada"), ("tiny:bob", "bob/iter_7")],
    ids=["base", "work dir", "checkpoint"],
)  # fmt: skip
def test_answers_are_those_of_chat(server, tuned, name, folder):
    session = open_chat(
        tuned / folder, options=GenerationOptions(max_new_tokens=12), dtype="float32"
    )
    expected = "".join(session.ask("Who are you?"))
    response = chat(server, name)
    assert text_of(response) == expected
    assert response.usage.completion_tokens <= 12 and response.model == name


def test_a_stream_has_the_same_text_and_ends_with_the_usage(server):
    whole = chat(server)
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == text_of(whole)
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == whole.choices[0].finish_reason and set(ends[:-1]) == {None}
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices


def test_requests_at_the_same_time_share_passes_and_answer_as_alone(server, monkeypatch):
    questions = ["?", "Who are you?", "Tell me about ships and captains.", "And then?"]
    cases = [(name, text) for name in ("tiny", "tiny:bob") for text in questions[:3]]
    alone = [text_of(chat(server, n, [{"role": "user", "content": t}])) for n, t in cases]
    sizes, right, gate = [], RunningBatch.step, threading.Event()

    def step(batch):
        gate.wait(10)  # until all have arrived
        sizes.append(len(batch.rows))
        return right(batch)

    monkeypatch.setattr(RunningBatch, "step", step)
    found = [None] * len(cases)

    def ask(i):
        name, text = cases[i]
        found[i] = text_of(chat(server, name, [{"role": "user", "content": text}]))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    while server.engine.num_open < len(cases):
        pass
    gate.set()
    for thread in threads:
        thread.join()
    assert found == alone
    assert max(sizes) > 1 and server.engine.num_open == 0


def test_a_seed_repeats_an_answer_and_n_gives_several(server):
    drawn = {"temperature": 1.5, "seed": 5, "n": 2, "top_p": 0.9}
    first, second = chat(server, **drawn), chat(server, **drawn)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]
    assert first.usage.prompt_tokens == chat(server).usage.prompt_tokens


def test_a_temperature_near_zero_is_greedy_and_harms_no_other_answer(server):
    greedy = chat(server, temperature=0).choices[0].message.content
    assert chat(server, temperature=1e-300).choices[0].message.content == greedy


def test_stop_words_end_an_answer_and_are_left_out(server):
    whole = text_of(chat(server))
    word = whole[3:5]
    response = chat(server, stop=[word])
    assert text_of(response) == whole.split(word)[0]
    assert response.choices[0].finish_reason == "stop"


def test_log_probabilities_of_an_answer(server):
    response = chat(server, logprobs=True, top_logprobs=3)
    entries = response.choices[0].logprobs.content
    assert len(entries) == response.usage.completion_tokens - (
        response.choices[0].finish_reason == "stop"
    )
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) <= 0


def test_completions_continue_texts_and_ids(server):
    create = server.client.completions.create
    ids = server.model("tiny").tokenizer("Ships")["input_ids"]
    common = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    texts = create(prompt=["Ships", "Once"], **common).choices
    assert [choice.index for choice in texts] == [0, 1]
    assert create(prompt=ids, **common).choices[0].text == texts[0].text
    scored = create(prompt="Ships", logprobs=2, **common).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs)
    chunks = create(prompt="Ships", stream=True, **common)
    assert "".join(chunk.choices[0].text for chunk in chunks) == texts[0].text


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt"}, 404, "available: tiny, tiny:ada, tiny:bob"),
        ({"messages": []}, 400, "messages"),
        ({"frequency_penalty": 1}, 400, "frequency_penalty is not supported"),
        ({"extra_body": {"max_new_tokens": 5}}, 400, "max_new_tokens: is not a parameter"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 99}, 400, "n: "),
        ({"extra_body": {"repetition_penalty": 1e-30}}, 400, "repetition_penalty"),
        ({"top_logprobs": 2}, 400, "logprobs = true"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "context length"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
    ],
    ids=[
        "model",
        "no messages",
        "penalty",
        "unknown",
        "temperature",
        "n",
        "repetition",
        "top",
        "long",
        "role",
    ],
)
def test_invalid_requests(server, change, status, words):
    with pytest.raises(openai.APIStatusError) as error:
        chat(server, **change)
    assert error.value.status_code == status
    assert words in error.value.body["message"]
    assert error.value.body["type"] == "invalid_request_error"
    assert server.engine.num_open == 0


def test_an_image_for_a_model_of_text_is_refused(server):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="is not an image"):
        chat(server, messages=[{"role": "user", "content": [part]}])
    part["image_url"]["url"] = "http://127.0.0.1/secret.png"
    with pytest.raises(openai.BadRequestError, match="does not fetch images"):
        chat(server, messages=[{"role": "user", "content": [part]}])
