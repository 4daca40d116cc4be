"""Batched answers equal those to each conversation alone."""

import pytest
import torch
from torch import nn

from xtuner import templates
from xtuner.errors import ModelError
from xtuner.generation.batch import generate_batch
from xtuner.generation.generate import GenerationOptions, stream
from xtuner.generation.running import takes_batches
from xtuner.kernels.attention import packed
from xtuner.models.adapters import add_adapter
from xtuner.testing.tiny import tiny_model, tiny_tokenizer
from xtuner.types import Message

TOKENIZER = tiny_tokenizer()
TEMPLATE = templates.load("auto", TOKENIZER)
CONVERSATIONS = [
    [Message("user", "Who are you?")],
    [Message("user", "Tell me a long story about a ship and its captain.")],
    [Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "And?")],
    [Message("user", "?")],
]


def alone(model, **options):
    chosen = GenerationOptions(**{"max_new_tokens": 20, **options})
    return [
        "".join(stream(model, TOKENIZER, template=TEMPLATE, messages=m, options=chosen))
        for m in CONVERSATIONS
    ]


def together(model, conversations=CONVERSATIONS, **options):
    return generate_batch(
        model,
        TOKENIZER,
        template=TEMPLATE,
        conversations=conversations,
        options=GenerationOptions(**{"max_new_tokens": 20, **options}),
    )


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("gpt2", {}),
    ],
    ids=["llama", "qwen3", "windows", "gemma3", "learned positions"],
)
def test_greedy_answers_are_those_to_each_alone(model_type, overrides):
    model = tiny_model(model_type, initializer_range=0.3, **overrides)
    found = together(model)
    assert found == alone(model)
    if "sliding_window" not in overrides:  # which covers hardly more than the end of the template
        assert len({*found}) == len(found)


def test_the_output_head_gets_contiguous_inputs():
    """Otherwise torch copies the head's weight once per row; the last positions are strided."""
    model = tiny_model("llama")
    head, seen = model.get_output_embeddings(), []
    handle = head.register_forward_hook(
        lambda _, inputs, __: seen.append((inputs[0].shape[:2], inputs[0].is_contiguous()))
    )
    together(model, max_new_tokens=2)
    handle.remove()
    assert (torch.Size([len(CONVERSATIONS), 1]), True) in seen
    assert all(contiguous for _, contiguous in seen)
    assert not head._forward_pre_hooks


def test_sampled_answers_with_a_seed_and_a_penalty_are_those_to_each_alone():
    drawn = {"temperature": 0.8, "top_k": 20, "seed": 3, "repetition_penalty": 1.3}
    model = tiny_model()
    assert together(model, **drawn) == alone(model, **drawn) != alone(model)


def test_rows_end_by_themselves_and_one_pass_serves_all(monkeypatch):
    model = tiny_model()
    complete = alone(model)
    word = next(text for text in complete if text)[2:4]
    passes = []
    right = type(model).forward

    def counted(self, *arguments, **options):
        passes.append(options["input_ids"].shape)
        return right(self, *arguments, **options)

    counted.__signature__ = __import__("inspect").signature(right)
    monkeypatch.setattr(type(model), "forward", counted)
    found = together(model, stop_words=(word,))
    assert found == [text.split(word)[0] for text in complete]
    assert 1 < len(passes) <= 20
    assert passes[0][0] == len(CONVERSATIONS) and {shape[1] for shape in passes[1:]} == {1}


def test_training_mode_is_restored():
    model = tiny_model()
    packed.register()
    model.set_attn_implementation(packed.NAME)
    adapted = add_adapter(model, r=2, alpha=4, dropout=0.5).train()
    random_state = torch.get_rng_state()
    together(adapted)
    assert adapted.training and model.config._attn_implementation == packed.NAME
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(m.training for m in adapted.modules() if isinstance(m, nn.Dropout))


def test_recurrent_model_answers_one_conversation_at_a_time():
    model = tiny_model("mamba", num_attention_heads=None, num_key_value_heads=None)
    assert not takes_batches(model)
    assert together(model) == alone(model)


def test_a_conversation_that_fills_the_context_is_refused():
    model = tiny_model(max_position_embeddings=64)
    long = [Message("user", "x" * 80)]
    with pytest.raises(ModelError, match="shorten the conversation"):
        together(model, [CONVERSATIONS[0], long])
