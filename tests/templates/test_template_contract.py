"""The contract of every template, whatever the tokenizer merges."""

from dataclasses import replace
from itertools import groupby
from operator import itemgetter

import pytest
from template_makers import EXACT, merging_tokenizer, space_tokenizer

from xtuner.templates import load
from xtuner.templates.table import NAMED
from xtuner.types import Conversation, Message

TOKENIZERS = {"merging": merging_tokenizer, "space": space_tokenizer}
VERBATIM = {name for name, spec in NAMED.items() if spec.answer == "{content}" + spec.stop}
CASES = [f"auto-{name}" for name in EXACT] + ["plain", *sorted(NAMED)]


def user(text):
    return Message("user", text)


def assistant(text, loss=None):
    return Message("assistant", text, loss)


CONVERSATIONS = {
    "single": [user("Hello"), assistant("Hello, how are you?")],
    "multi": [user("Hello"), assistant("Fine."), user("And you?"), assistant("Fine, thank you.")],
    "system": [Message("system", "You are kind."), user("Hello"), assistant("Fine.")],
    "unicode": [user("你好，请做一下自我介绍。🙂"), assistant("我是小明的小助手。🙂👩‍👩‍👧")],
    "spaces": [
        user("  Hello \n"),
        assistant("  two spaces  "),
        user("\n"),
        assistant("\n\nHello\n"),
    ],
    "left out": [user("Hello"), assistant("No.", False), user("Hello"), assistant("Yes.")],
    "specials": [user("what is <b>{content}</b>?"), assistant("{eos} {round} [INST] Hello: ")],
    "open": [user("Hello"), assistant("Fine."), user("Hello?")],
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def make_tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture(scope="module")
def make(make_tokenizer):
    def build(case, system=""):
        name = case.removeprefix("auto-")
        source = EXACT[name][0] if case != name else None
        tokenizer = make_tokenizer(chat_template=source)
        return load("auto" if source else case, tokenizer, system=system), tokenizer

    return build


@pytest.fixture(params=CONVERSATIONS)
def messages(request):
    return CONVERSATIONS[request.param]


def pieces(encoded):
    """The supervised runs of ids."""
    runs, last = [], False
    for token, on in zip(*encoded[:2], strict=True):
        if on and not last:
            runs.append([])
        if on:
            runs[-1].append(token)
        last = on
    return runs


def expected_stop(template):
    return template.stop_words[0]


@pytest.mark.parametrize("case", CASES)
def test_supervised_tokens_are_the_answers_and_their_stop(make, make_tokenizer, case, messages):
    template, tokenizer = make(case)
    runs = pieces(template.encode(Conversation(tuple(messages))))
    said = [m.content for m in messages if m.supervised]
    stop = expected_stop(template)
    assert len(runs) == len(said)
    for run, content in zip(runs, said, strict=True):
        text = tokenizer.decode(run)
        assert text.endswith(stop)
        spoken = text.removesuffix(stop)
        if case in VERBATIM and make_tokenizer is not space_tokenizer:
            assert spoken == content
        assert spoken.strip() == content.strip()


@pytest.mark.parametrize("case", CASES)
def test_every_token_of_an_answer_has_its_weight(make, case):
    template, _ = make(case)
    turns = [user("Hello"), assistant("Fine."), user("And you?"), assistant("Fine, thank you.")]
    ids, mask, none = template.encode(Conversation(tuple(turns)))
    assert none is None
    weighted = [turns[0], replace(turns[1], weight=0.25), *turns[2:]]
    same_ids, same_mask, weights = template.encode(Conversation(tuple(weighted)))
    assert (same_ids, same_mask) == (ids, mask)
    runs = [list(run) for on, run in groupby(zip(mask, weights, strict=True), itemgetter(0)) if on]
    assert [{weight for _, weight in run} for run in runs] == [{0.25}, {1.0}]
    excluded = [turns[0], replace(turns[1], weight=0.0), *turns[2:]]
    assert sum(template.encode(Conversation(tuple(excluded))).loss_mask) == len(runs[1])


@pytest.mark.parametrize("case", CASES)
def test_prompt_is_a_prefix_of_the_conversation(make, case, messages):
    template, _ = make(case)
    ids, mask, _ = template.encode(Conversation(tuple(messages)))
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt = template.prompt_ids(messages[:index])
        assert ids[: len(prompt)] == prompt
        if message.supervised:
            assert mask[len(prompt)]
            assert not mask[len(prompt) - 1]


@pytest.mark.parametrize("case", CASES)
def test_ids_are_the_text(make, make_tokenizer, case, messages):
    template, tokenizer = make(case)
    rendered = template.render(messages)
    decoded = tokenizer.decode(template.encode(Conversation(tuple(messages))).input_ids)
    if make_tokenizer is space_tokenizer:  # it adds a space before texts
        assert decoded.replace(" ", "") == rendered.text.replace(" ", "")
    else:
        assert decoded == rendered.text
    spoken = [m for m in messages if m.role == "assistant"]
    for turn, message in zip(rendered.turns, spoken, strict=True):
        assert message.content.strip() in rendered.text[turn.start : turn.end]
        assert turn.supervised is message.supervised


@pytest.mark.parametrize("case", CASES)
def test_default_system_message(make, case):
    template, _ = make(case, system="Speak like a pirate.")
    plain = [user("Hello"), assistant("Ahoy")]
    own = [Message("system", "Be brief."), *plain]
    assert "Speak like a pirate." in template.render(plain).text
    assert "Speak like a pirate." not in template.render(own).text
    assert "Be brief." in template.render(own).text
    explicit = [Message("system", "Speak like a pirate."), *plain]
    assert make(case)[0].render(explicit) == template.render(plain)


@pytest.mark.parametrize("case", CASES)
def test_stop_ids(make, case):
    template, tokenizer = make(case)
    assert tokenizer.eos_token_id in template.stop_token_ids
    stop = tokenizer.convert_tokens_to_ids(expected_stop(template))
    if stop != tokenizer.unk_token_id:
        assert stop in template.stop_token_ids


@pytest.mark.parametrize("case", CASES)
def test_first_token_stands_once(make, case):
    template, tokenizer = make(case)
    ids = template.encode(Conversation(tuple(CONVERSATIONS["single"]))).input_ids
    assert ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("case", CASES)
def test_odd_conversations_end_in_ids_or_a_data_error(make, case):
    from xtuner.errors import DataError

    template, _ = make(case)
    odd = [
        [],
        [assistant("Hello")],
        [Message("system", "Be kind.")],
        [Message("system", "Be kind."), assistant("Hello")],
        [user("a"), user("b"), assistant("c")],
        [user("a"), assistant("b"), assistant("c")],
    ]
    for messages in odd:
        try:
            encoded = template.encode(Conversation(tuple(messages)))
        except DataError:
            continue
        assert len(encoded.input_ids) == len(encoded.loss_mask)
