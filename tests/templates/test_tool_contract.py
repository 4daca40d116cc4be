"""The contract of every template with tools: calls are supervised, results never, prompts are
prefixes, and supervised text is read back as the same calls."""

import random

import pytest
from call_makers import make_calls
from template_makers import CHATML, GEMMA, byte_tokenizer, merging_tokenizer, space_tokenizer
from template_makers import TOKENS as PLAIN_TOKENS
from tool_templates import TOKENS, WITH_TOOLS

from xtuner.calls.check import CallPolicy, with_ids
from xtuner.calls.families.base import parse
from xtuner.calls.families.internlm2 import InternLM2
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.errors import DataError
from xtuner.templates import load
from xtuner.types import Conversation, Message

INTERNLM2_TOKENS = {
    "<|plugin|>": 92538, "<|interpreter|>": 92539, "<|action_end|>": 92540,
    "<|action_start|>": 92541, "<|im_end|>": 92542, "<|im_start|>": 92543,
}  # fmt: skip
OTHERS = {
    "default layout, chatml": ("auto", CHATML, "hermes"),
    "default layout, no system turn": ("auto", GEMMA, "hermes"),
    "plain": ("plain", None, "hermes"),
    "vicuna": ("vicuna", None, "hermes"),
    "llama2_chat": ("llama2_chat", None, "hermes"),
    "xtuner0_default": ("xtuner0_default", None, "hermes"),
    "internlm2_chat": ("internlm2_chat", None, "internlm2"),
    "internlm2, its own template": ("auto", CHATML, "internlm2"),
}  # fmt: skip
CASES = {name: ("auto", *row) for name, row in WITH_TOOLS.items()} | OTHERS
WITHOUT_TEXT = (
    "llama3.1", "deepseek", "mistral", "mistral, tools at the last question", "hermes3",
    "deepseek r1",
)  # fmt: skip
"""Cases whose templates do not show text before a call."""
SECRET = "the result 4711"


def tool(name, properties):
    schema = {"type": "object", "properties": properties}
    function = {"name": name, "description": f"About {name}.", "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = (
    tool("weather", {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {}}),
    tool("python_interpreter", {"code": {"type": "string"}}),
)
ASK = Message("user", "How is the weather?")
CALL = Message(
    "assistant", "I look it up.",
    tool_calls=(make_call("weather", {"city": 'Zürich "West"\n</x>', "days": 2}),),
)  # fmt: skip
BARE = Message("assistant", "", tool_calls=CALL.tool_calls)
RESULT, TELL = Message("tool", SECRET), Message("assistant", "It is sunny.")


def make(case, kind=byte_tokenizer, **options):
    name, source, family = CASES[case]
    tokens = (*PLAIN_TOKENS, *TOKENS)
    if "internlm2" in family:
        tokens += tuple(t for t in INTERNLM2_TOKENS if t not in PLAIN_TOKENS)
    tokenizer = kind(chat_template=source, tokens=tokens)
    return load(name, tokenizer, **options), tokenizer


def conversation(*messages, tools=TOOLS):
    return with_ids(Conversation(tuple(messages), tools))


def runs(template, tokenizer, record):
    """The texts of the supervised runs of all sequences, in the order of the conversation."""
    found = []
    for ids, mask, _ in template.sequences(record):
        last = False
        for at, (token, on) in enumerate(zip(ids, mask, strict=True)):
            if on and not last:
                found.append((at, []))
            if on:
                found[-1][1].append(token)
            last = on
    return [tokenizer.decode(run) for _, run in sorted(found, key=lambda pair: pair[0])]


def calls_in(template, text):
    _, found = parse(template.tool_family, text, tools=TOOLS)
    assert not [each.problem for each in found if each.problem]
    return [(name_of(each.call), arguments_of(each.call)) for each in found]


def compared(calls):
    return [(name_of(call), arguments_of(call)) for call in calls]


@pytest.mark.parametrize("case", CASES)
def test_calls_are_supervised_and_results_never(case):
    template, tokenizer = make(case)
    assert template.tool_family.name == CASES[case][2]
    call = BARE if case in WITHOUT_TEXT else CALL
    record = conversation(ASK, call, RESULT, TELL)
    called, told = runs(template, tokenizer, record)
    assert calls_in(template, called) == compared(call.tool_calls)
    assert call.content in called and "It is sunny." in told
    assert SECRET not in called + told
    assert SECRET in template.render(record.messages, tools=TOOLS).text
    stop = template.stop_words[0]
    assert any(called.endswith(word) for word in template.stop_words), stop


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_prefixes_and_show_the_tools(case):
    for kind in (byte_tokenizer, merging_tokenizer, space_tokenizer):
        template, tokenizer = make(case, kind)
        record = conversation(ASK, BARE, RESULT, TELL)
        sequences = template.sequences(record)
        for index in (1, 3):
            prompt = template.prompt_ids(record.messages[:index], tools=TOOLS)
            (mask,) = [
                mask for ids, mask, _ in sequences
                if ids[: len(prompt)] == prompt and mask[len(prompt)]
            ]  # fmt: skip
            assert not mask[len(prompt) - 1]
        assert "weather" in tokenizer.decode(template.prompt_ids((ASK,), tools=TOOLS))


@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_read_back_for_any_arguments(case):
    template, tokenizer = make(case)
    single = case == "llama3.1"
    between_tags = template.tool_family.name in ("qwen_xml", "glm4_5")
    for seed in range(12):
        calls = make_calls(seed, most=1 if single else 3)
        declared = tuple(
            tool(name_of(c), {k: {"type": "string"} if isinstance(v, str) else {}
                              for k, v in arguments_of(c).items()})
            for c in calls
        )  # fmt: skip
        if between_tags and ("</" in str(calls) or "<tool_call>" in str(calls)):
            continue
        if between_tags:
            calls, declared = calls[:1], declared[:1]
        record = conversation(
            ASK, Message("assistant", "", tool_calls=tuple(calls)), tools=declared
        )
        (text,) = runs(template, tokenizer, record)
        _, found = parse(template.tool_family, text, tools=declared)
        assert compared(f.call for f in found if f.call) == compared(calls), seed


@pytest.mark.parametrize("case", [c for c in CASES if c not in WITHOUT_TEXT])
def test_thoughts_are_masked_exactly(case):
    for kind in (byte_tokenizer, merging_tokenizer):
        template, tokenizer = make(case, kind)
        record = Conversation((ASK, CALL, RESULT, TELL), TOOLS)
        learned = CallPolicy(thoughts="learn").applied(record)
        masked = CallPolicy(thoughts="mask").applied(record)
        removed = CallPolicy(thoughts="remove").applied(record)
        pairs = zip(template.sequences(masked), template.sequences(learned), strict=True)
        assert all(one.input_ids == other.input_ids for one, other in pairs)
        assert "I look it up." in "".join(runs(template, tokenizer, learned))
        *_, called, told = runs(template, tokenizer, masked)
        assert "look it up" not in "".join(runs(template, tokenizer, masked))
        assert "weather" in called and "It is sunny." in told
        text = "".join(tokenizer.decode(ids) for ids, *_ in template.sequences(removed))
        assert "look it up" not in text and "weather" in text


def test_reasoning_is_masked_too():
    source = WITH_TOOLS["qwen2.5"][0].replace(
        "{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
        "{% endif %}{{ m.content }}",
    )  # fmt: skip
    tokenizer = byte_tokenizer(chat_template=source)
    template = load("auto", tokenizer)
    said = Message("assistant", "Yes.", reasoning="Hm, let me see.")
    record = CallPolicy(thoughts="mask").applied(Conversation((ASK, said)))
    assert runs(template, tokenizer, record) == ["<think>", "</think>Yes.<|im_end|>"]


def test_the_ids_of_internlm2():
    core = byte_tokenizer(tokens=("<unk>", "<s>", "</s>")).backend_tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = dict(core.get_vocab())
    fill = (f"[UNUSED_TOKEN_{i}]" for i in range(len(vocab), 92538))
    vocab |= {token: len(vocab) + i for i, token in enumerate(fill)} | INTERNLM2_TOKENS
    big = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    big.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    big.decoder = decoders.ByteLevel()
    big.add_special_tokens(["<unk>", "<s>", "</s>", *INTERNLM2_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=big, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    template = load("internlm2_chat", tokenizer)
    code = Message("assistant", "", tool_calls=(make_call("python_interpreter", {"code": "1+1"}),))
    record = conversation(ASK, CALL, RESULT, ASK, code, Message("tool", "2"), TELL)
    ids, mask, _ = template.encode(record)
    plugin = ids.index(92541)
    assert ids[plugin : plugin + 2] == [92541, 92538] and mask[plugin] and mask[plugin + 1]
    assert [ids.count(i) for i in (92541, 92540, 92542)] == [2, 2, 9]
    interpreter = ids.index(92541, plugin + 1)
    assert ids[interpreter + 1] == 92539
    text = tokenizer.decode(ids)
    assert '<|action_start|><|plugin|>\n{"name": "weather", "parameters": {' in text
    assert f"<|im_start|>environment name=<|plugin|>\n{SECRET}<|im_end|>" in text
    assert "<|im_start|>environment name=<|interpreter|>\n2<|im_end|>" in text
    assert "<|im_start|>system name=<|plugin|>\n[\n" in text
    assert "<|im_start|>system name=<|interpreter|>\n" in text
    assert "<|action_start|><|interpreter|>\n```python\n1+1\n```<|action_end|><|im_end|>" in text
    assert 92542 in template.stop_token_ids


def test_one_row_is_the_same_in_both_templates_of_internlm2():
    record = conversation(Message("system", "Be kind."), ASK, CALL, RESULT, TELL)
    named, _ = make("internlm2_chat")
    own, _ = make("internlm2, its own template")
    text = named.render(record.messages, tools=TOOLS).text
    assert text == "<s>" + own.render(record.messages, tools=TOOLS).text


def test_model_without_parallel_calls_raises():
    template, _ = make("llama3.1")
    two = Message("assistant", "", tool_calls=CALL.tool_calls * 2)
    with pytest.raises(DataError, match="one call at once"):
        template.encode(conversation(ASK, two))


def test_ids_that_a_template_refuses_are_replaced():
    template, _ = make("mistral")
    calls = [make_call("weather", {"city": c}, call_id=f"call_{c}") for c in "ab"]
    results = [Message("tool", c, tool_call_id=f"call_{c}") for c in "ab"]
    record = conversation(ASK, Message("assistant", "", tool_calls=tuple(calls)), *results, TELL)
    text = template.render(record.messages, tools=TOOLS).text
    assert '"id": "call00001"' in text and '"id": "call00002"' in text


def test_results_of_several_calls_share_a_turn_in_the_default_layout():
    template, _ = make("vicuna")
    two = Message("assistant", "", tool_calls=CALL.tool_calls * 2)
    record = conversation(ASK, two, Message("tool", "one"), Message("tool", "two"), TELL)
    text = template.render(record.messages, tools=TOOLS).text
    assert text.count("USER: ") == 2
    assert "</tool_response>\n<tool_response>\ntwo" in text


def test_spec_can_name_a_tool_family():
    from xtuner.templates.named import NamedTemplate
    from xtuner.templates.spec import Spec

    spec = Spec(system="{content}\n", user="Q: {content}\n", assistant="A: ", tool_calls="react")
    template = NamedTemplate("x", byte_tokenizer(), spec=spec)
    text = template.render(conversation(ASK, CALL, RESULT).messages, tools=TOOLS).text
    assert "Action: weather\nAction Input: {" in text and "Action: NAME" in text
    wrong = Spec(
        system="{content}", user="{content}", assistant="", tool_calls="x", further="{role}"
    )
    assert [p.partition(":")[0] for p in wrong.problems()] == ["tool_calls", "further"]


def test_code_of_internlm2_may_hold_anything():
    rng = random.Random(0)
    family = InternLM2("internlm2")
    for _ in range(50):
        code = "".join(rng.choices("a\"'`\n{}<|>\\", k=30))
        call = make_call("python_interpreter", {"code": code})
        _, (found,) = parse(family, family.render([call]))
        assert arguments_of(found.call) == {"code": code}
