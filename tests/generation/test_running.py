"""Answers that join and leave a running batch equal those to each prompt alone."""

import pytest
import torch

from xtuner import templates
from xtuner.generation.answer import Answer
from xtuner.generation.detokenize import StopWords
from xtuner.generation.generate import GenerationOptions, chooser, generation_mode, stream
from xtuner.generation.running import OneByOne, RunningBatch, takes_batches
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.types import Message

TOKENIZER = tiny_tokenizer()
TEMPLATE = templates.load("auto", TOKENIZER)
QUESTIONS = ["Who are you?", "?", "Tell me a long story about a ship and its captain.", "And then?"]
OPTIONS = GenerationOptions(max_new_tokens=12)


def answer(text, *, limit=12, top_logprobs=None):
    return Answer(
        TEMPLATE.prompt_ids([Message("user", text)]),
        tokenizer=TOKENIZER,
        words=StopWords(TEMPLATE.stop_words),
        ends=frozenset(TEMPLATE.stop_token_ids),
        limit=limit,
        choose=chooser(OPTIONS, torch.device("cpu")),
        top_logprobs=top_logprobs,
    )


def alone(model, text):
    messages = [Message("user", text)]
    pieces = stream(model, TOKENIZER, template=TEMPLATE, messages=messages, options=OPTIONS)
    return "".join(pieces)


def joined(batch, model, rows):
    """The texts of `rows`, the next of which joins after every third step."""
    texts, waiting, steps = {id(row): "" for row in rows}, list(rows), 0
    with generation_mode(model):
        while waiting or batch.rows:
            found = batch.step() if batch.rows else []
            if waiting and steps % 3 == 0:
                found += batch.admit([waiting.pop(0)])
            for row, piece in found:
                texts[id(row)] += piece
            steps += 1
    return [texts[id(row)] for row in rows]


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("gemma3_text", {"sliding_window": 8}), ("gpt2", {})],
    ids=["llama", "windows", "learned positions"],
)
def test_answers_that_join_later_are_those_alone(model_type, overrides):
    model = tiny_model(model_type, initializer_range=0.3, **overrides)
    assert takes_batches(model)
    rows = [answer(text) for text in QUESTIONS]
    assert joined(RunningBatch(model), model, rows) == [alone(model, text) for text in QUESTIONS]
    assert {row.finish for row in rows} <= {"stop", "length"}


def test_a_row_that_is_removed_changes_no_other():
    model = tiny_model(initializer_range=0.3)
    kept, gone = answer(QUESTIONS[1]), answer(QUESTIONS[2])
    with generation_mode(model):
        batch = RunningBatch(model)
        found = batch.admit([gone, kept])
        found += batch.step()
        batch.remove([gone])
        assert batch._mask.shape[1] == len(kept.ids) - 1  # the padding of the longer row is removed
        while batch.rows:
            found += batch.step()
    assert "".join(piece for row, piece in found if row is kept) == alone(model, QUESTIONS[1])


def test_recurrent_model_answers_in_turn():
    model = tiny_model("mamba", num_attention_heads=None, num_key_value_heads=None)
    rows = [answer(text) for text in QUESTIONS[:2]]
    assert joined(OneByOne(model), model, rows) == [alone(model, text) for text in QUESTIONS[:2]]


def test_scores_are_log_probabilities_of_the_model():
    model = tiny_model(initializer_range=0.3)
    row = answer(QUESTIONS[0], limit=3, top_logprobs=2)
    prompt = list(row.ids)
    with generation_mode(model):
        batch = RunningBatch(model)
        batch.admit([row])
        while batch.rows:
            batch.step()
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0]
    logprobs = logits.log_softmax(-1)[len(prompt) - 1 :]
    for i, score in enumerate(row.scores):
        assert score.token_id == row.ids[len(prompt) + i]
        assert score.logprob == pytest.approx(float(logprobs[i, score.token_id]), abs=1e-5)
        assert len(score.top) == 2 and score.top[0] == (score.token_id, score.logprob)


class Unread(list):
    def __iter__(self):
        raise AssertionError("the ids of the conversation are read")


def test_only_a_repetition_penalty_reads_the_ids():
    scores = torch.tensor([[1.0, 3.0, 2.9]])
    assert chooser(OPTIONS, torch.device("cpu"))(Unread([1]), scores).tolist() == [1]
    penalized = GenerationOptions(max_new_tokens=12, repetition_penalty=2.0)
    # 7 is the id of an image: outside the vocabulary
    assert chooser(penalized, torch.device("cpu"))([7, 1], scores).tolist() == [2]
