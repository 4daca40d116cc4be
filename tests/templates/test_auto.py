"""The tokenizer's own chat template."""

import logging
import pickle
from itertools import groupby

import pytest
from template_makers import (
    CHATML,
    GEMMA,
    LLAMA3,
    MARKED,
    MARKED_CONTENT,
    REWRITES,
    THINKS,
    THINKS_MARKED,
    TOOLS,
    byte_tokenizer,
)

from xtuner.errors import DataError, ModelError
from xtuner.templates import load
from xtuner.templates.auto import CLOSED_THOUGHT
from xtuner.types import Conversation, Message

ASK, TELL = Message("user", "Hi"), Message("assistant", "Hello")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = Message(
    "assistant",
    "",
    tool_calls=({"type": "function", "function": {"name": "weather", "arguments": {}}},),
)


def auto(source, **options):
    tokenizer = byte_tokenizer(chat_template=source, eos="<|im_end|>")
    return load("auto", tokenizer, **options), tokenizer


def learnt(template, tokenizer, *messages, tools=()):
    ids, mask, _ = template.encode(Conversation(tuple(messages), tools))
    return tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on])


def sequences(template, tokenizer, *messages, tools=()):
    """The texts of the sequences, with supervised tokens between « and »."""
    texts = []
    for ids, mask, _ in template.sequences(Conversation(tuple(messages), tools)):
        pairs = groupby(zip(ids, mask, strict=True), lambda pair: pair[1])
        runs = [(on, tokenizer.decode([token for token, _ in run])) for on, run in pairs]
        texts.append("".join(f"«{run}»" if on else run for on, run in runs))
    return texts


def test_exact_ids_of_one_turn():
    template, tokenizer = auto(CHATML)
    ids, mask, _ = template.encode(Conversation((ASK, TELL)))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert mask == [False] * (len(ids) - 7) + [True] * 6 + [False]


def test_rewritten_earlier_turns_are_learnt_in_sequences_of_their_own(caplog):
    template, tokenizer = auto(REWRITES)
    yes = Message("assistant", "Yes")
    chat = (ASK, yes, ASK, TELL)
    last, first = sequences(template, tokenizer, *chat)
    empty = "<think>\n\n</think>\n\n"
    assert last.endswith(f"user\nHi<|im_end|>\n<|im_start|>assistant\n«{empty}Hello<|im_end|>»\n")
    assert "<|im_start|>assistant\nYes<|im_end|>" in last
    assert (
        first == f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«{empty}Yes<|im_end|>»\n"
    )
    for end, encoded in zip((3, 1), template.sequences(Conversation(chat)), strict=True):
        prompt = template.prompt_ids(chat[:end])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.loss_mask.index(True) == len(prompt)
    assert not caplog.records


def test_one_sequence_of_rewritten_turns_has_the_last_and_says_so_once(caplog):
    template, tokenizer = auto(REWRITES)
    last = "<think>\n\n</think>\n\nHello<|im_end|>"
    assert learnt(template, tokenizer, ASK, TELL) == last
    assert not caplog.records
    for _ in range(2):
        assert learnt(template, tokenizer, ASK, Message("assistant", "Yes"), ASK, TELL) == last
    assert [r.message.startswith("the model's chat template rewrites") for r in caplog.records] == [
        True
    ]
    assert "'chatml'" in caplog.text


@pytest.mark.parametrize("source", [THINKS, THINKS_MARKED], ids=["plain", "marked"])
def test_an_answer_behind_a_prompt_that_opens_a_thought(source):
    template, tokenizer = auto(source)
    chat = (ASK, TELL, ASK, Message("assistant", "36", reasoning="Ten threes."))
    last, first = sequences(template, tokenizer, *chat)
    opened = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n«"
    assert first == f"{opened}\n</think>\n\nHello<|im_end|>»"
    assert last.endswith(f"Hello<|im_end|>\n{opened}Ten threes.\n</think>\n\n36<|im_end|>»")
    inline = Message("assistant", "<think>\nTen threes.\n</think>\n\n36")
    assert sequences(template, tokenizer, *chat[:3], inline)[0].rstrip() == last
    assert template.encode(Conversation((ASK,))).loss_mask.count(True) == 0


def test_the_end_of_a_thought_is_that_of_the_template():
    shown = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}</think>{% endif %}"
    source = THINKS.replace("{{ '<|im_start|>' + m.role + '\\n' + m.content", (
        "{{ '<|im_start|>' + m.role + '\\n' }}" + shown + "{{ m.content"
    ))  # fmt: skip
    template, tokenizer = auto(source)
    (only,) = sequences(template, tokenizer, ASK, TELL)
    assert only.endswith("<think>\n«</think>Hello<|im_end|>»")


def test_reasoning_is_left_out_behind_a_prompt_that_closes_the_thought(caplog):
    closed = "<think>\\n\\n</think>\\n\\n"
    template, tokenizer = auto(THINKS.replace("<think>\\n", closed))
    said = Message("assistant", "36", reasoning="Ten threes.")
    for _ in range(2):
        (only,) = sequences(template, tokenizer, ASK, said)
    assert only.endswith("<think>\n\n</think>\n\n«36<|im_end|>»")
    assert [r.message for r in caplog.records] == [CLOSED_THOUGHT]


def test_a_history_that_changes_with_the_answer_is_that_of_the_chat():
    source = "{% if messages[-1].role == 'user' %}asked {% endif %}" + CHATML
    template, tokenizer = auto(source)
    last, first = sequences(template, tokenizer, ASK, TELL, ASK, TELL)
    assert first.startswith("asked <|im_start|>user") and first.endswith("\n«Hello<|im_end|>»")
    assert last.startswith("asked ") and last.count("«") == 1


def test_a_prompt_that_no_turn_begins_with_is_an_error():
    opened = "{{ '<|im_start|>assistant\\nHere is my plan:\\n' }}"
    template, _ = auto(CHATML.replace("{{ '<|im_start|>assistant\\n' }}", opened))
    with pytest.raises(ModelError, match=r"my plan:.n', which the rendered turn") as caught:
        template.encode(Conversation((ASK, TELL)))
    assert "Use a named template that fits, such as 'chatml'" in str(caught.value)


@pytest.mark.parametrize("source", [MARKED, MARKED_CONTENT])
def test_marks_give_the_turns_from_after_the_prompt_to_the_stop(source):
    template, tokenizer = auto(source)
    said = learnt(template, tokenizer, ASK, TELL, ASK, Message("assistant", "No", False), ASK, TELL)
    assert said == "Hello<|im_end|>" * 2


def test_marks_serve_where_earlier_turns_are_rewritten():
    source = REWRITES.replace(
        "<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}",
        "<think>\\n\\n</think>\\n\\n' }}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
    )
    assert "generation %}" in source
    source = source.replace(
        "{% else %}",
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}",
    )
    template, tokenizer = auto(source)
    said = learnt(template, tokenizer, ASK, Message("assistant", "Yes"), ASK, TELL)
    assert said.startswith("Yes<|im_end|>")
    assert said.endswith("Hello<|im_end|>")


def test_system_message_is_folded_where_the_template_refuses_it():
    template, _ = auto(GEMMA, system="Be kind.")
    text = template.render((ASK, TELL)).text
    assert text.startswith("<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>")
    with pytest.raises(DataError, match="does not support a system message without a user turn"):
        template.render((Message("system", "x"), TELL))


def test_template_that_refuses_roles_is_a_data_error():
    template, _ = auto(GEMMA)
    with pytest.raises(DataError, match=r"roles: user, user\): must alternate"):
        template.encode(Conversation((ASK, ASK)))


def test_broken_or_missing_template_is_a_model_error():
    with pytest.raises(ModelError, match=r"is invalid \(line 1"):
        auto("{% for m in messages %}")
    with pytest.raises(ModelError, match=r"has no chat template, .* prompt_template = 'default'"):
        auto(None)


def test_tools_and_calls_are_shown_and_calls_learnt():
    template, tokenizer = auto(TOOLS)
    result = Message("tool", "sunny")
    said = learnt(template, tokenizer, ASK, CALL, result, TELL, tools=(TOOL,))
    assert said == (
        '<tool_call>{"name": "weather", "arguments": {}}</tool_call><|im_end|>Hello<|im_end|>'
    )
    assert '"name": "weather"' in tokenizer.decode(template.prompt_ids((ASK,), tools=(TOOL,)))


def test_reasoning_is_learned_where_the_template_renders_it(caplog):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.KEY %}<think>\n{{ m.KEY }}\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thought = Message("assistant", "36", reasoning="Ten threes are thirty.")
    for key in ("reasoning_content", "thinking", "reasoning"):
        template, tokenizer = auto(source.replace("KEY", key))
        learned = learnt(template, tokenizer, ASK, thought)
        assert learned == "<think>\nTen threes are thirty.\n</think>\n\n36<|im_end|>"
    assert not caplog.records


@pytest.mark.parametrize("name", ["auto", "plain", "chatml"])
def test_template_without_reasoning_says_so_once(name, caplog):
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    template = load(name, tokenizer)
    for _ in range(2):
        learnt(template, tokenizer, ASK, Message("assistant", "36", reasoning="A thought."))
    said = [r.message for r in caplog.records if "reasoning_content" in r.message]
    assert len(said) == 1 and "not trained on" in said[0]


def test_glm_stops_by_opening_the_next_turn():
    source = (
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    template, tokenizer = auto(source)
    assert learnt(template, tokenizer, ASK, TELL, ASK, TELL) == "\nHello<|user|>" * 2
    assert "<|user|>" in template.stop_words
    assert tokenizer.convert_tokens_to_ids("<|user|>") in template.stop_token_ids
    prompt = template.prompt_ids((ASK, TELL, ASK))
    assert template.encode(Conversation((ASK, TELL, ASK, TELL))).input_ids[: len(prompt)] == prompt


def test_verbatim_refuses_calls():
    tokenizer = byte_tokenizer(chat_template=CHATML, eos="<|im_end|>")
    with pytest.raises(DataError, match="'verbatim' does not render tool calls"):
        learnt(load("verbatim", tokenizer), tokenizer, ASK, CALL)


def test_tokenizer_with_a_template_of_its_own_for_tools():
    template, tokenizer = auto({"default": CHATML, "tool_use": TOOLS})
    assert learnt(template, tokenizer, ASK, TELL) == "Hello<|im_end|>"
    assert "weather" in learnt(template, tokenizer, ASK, CALL, tools=(TOOL,))
    with pytest.raises(ModelError, match="multiple chat templates with no default"):
        auto({"one": CHATML, "two": TOOLS})


def test_template_without_tools_says_so(caplog):
    template, _ = auto(CHATML)
    for _ in range(2):
        template.encode(Conversation((ASK, TELL), (TOOL,)))
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "has no tools; tools and calls are written in the layout 'hermes'" in caplog.text


def test_turn_that_ends_with_another_stop():
    source = LLAMA3.replace(
        "m.content | trim + '<|eot_id|>'",
        "m.content + ('<|eom_id|>' if m.content == 'call' else '<|eot_id|>')",
    )
    template, tokenizer = auto(source)
    assert learnt(template, tokenizer, ASK, Message("assistant", "call")) == "call<|eom_id|>"
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eot_id|>", "<|eom_id|>"])
    assert set(ids) == set(template.stop_token_ids)


def test_answer_without_a_stop_is_learnt_bare_with_a_warning(caplog):
    source = CHATML.replace("<|im_end|>", "")
    template, tokenizer = auto(source)
    assert learnt(template, tokenizer, ASK, TELL) == "Hello"
    assert "cannot teach the model to stop" in caplog.text


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            "{% for m in messages %}{{ ('<｜User｜>' if m.role == 'user' else '<｜Assistant｜>') "
            "+ m.content }}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
            "deepseek_r1",
        ),
    ],
)
def test_the_hint_names_the_template_of_the_models_family(source, named, caplog):
    auto(source)
    assert f"such as '{named}'" in caplog.text


def test_answer_that_contains_the_stop():
    template, tokenizer = auto(CHATML)
    odd = Message("assistant", "It ends with <|im_end|>, see?")
    assert learnt(template, tokenizer, ASK, odd, ASK) == "It ends with <|im_end|>, see?<|im_end|>"


def test_assistant_who_speaks_first_is_learnt_where_the_template_allows_it():
    template, tokenizer = auto(CHATML)
    assert learnt(template, tokenizer, TELL, ASK, TELL) == "Hello<|im_end|>" * 2
    template, tokenizer = auto(
        "{% set first = messages[0].role %}" + CHATML.replace("{% if add", "{% if first and add")
    )
    assert learnt(template, tokenizer, TELL, ASK, TELL).endswith("Hello<|im_end|>")


def test_todays_date_is_fixed():
    today = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    template, _ = auto(today + CHATML)
    assert template.render((ASK,)).text.startswith("26 Jul 2024")


def test_fingerprint_follows_what_changes_the_text():
    prints = {auto(CHATML)[0].fingerprint(), auto(LLAMA3)[0].fingerprint()}
    prints.add(auto(CHATML, system="Be kind.")[0].fingerprint())
    assert len(prints) == 3
    assert auto(CHATML)[0].fingerprint() in prints


def test_goes_to_another_process():
    template, _ = auto(CHATML, system="Be kind.")
    copy = pickle.loads(pickle.dumps(template))
    assert copy.encode(Conversation((ASK, TELL))) == template.encode(Conversation((ASK, TELL)))
    assert copy.fingerprint() == template.fingerprint()
