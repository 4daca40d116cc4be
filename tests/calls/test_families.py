"""Families read back what they render, split in any way; everything else is reported or stays
text."""

import json
import random

import pytest
from call_makers import make_calls, make_text, pieces_of

from xtuner.calls.families import FAMILIES, PROBE_TOOL, PROBES, find, load
from xtuner.calls.families.base import CUT_OFF, Found, Parser, Prose, parse
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.errors import ConfigError

SEEDS = range(60)
BETWEEN_TAGS = (
    "qwen_xml", "seed_oss", "glm4_5", "minimax_m2", "deepseek_v3_2", "deepseek_v4",
)  # fmt: skip
"""Families whose arguments stand between tags: their values cannot hold these tags."""
AT_START = [name for name, family in FAMILIES.items() if family.only_at_start]


def declared(calls):
    """Tools for `calls`, in which every argument that is text is declared as a string."""
    tools = {}
    for call in calls:
        properties = tools.setdefault(name_of(call), {})
        for key, value in arguments_of(call).items():
            kind = {"type": "string"} if isinstance(value, str) else {}
            properties[key] = kind if properties.get(key, kind) == kind else {}
    return [
        {"type": "function", "function": {"name": n, "parameters": {"properties": p}}}
        for n, p in tools.items()
    ]


def cases(name):
    for seed in SEEDS:
        calls = make_calls(seed)
        if name in BETWEEN_TAGS:
            calls = calls[:1]
            values = json.dumps(arguments_of(calls[0]), ensure_ascii=False)
            if "</" in values or "<tool_call>" in values:
                continue
        if name == "glm4":  # names of declared tools are words
            calls = [make_call(name_of(c).replace(".", "_"), arguments_of(c)) for c in calls]
        if name in ("moss", "pythonic", "lfm2"):  # names of Python functions
            calls = [make_call(name_of(c).replace("-", "_"), arguments_of(c)) for c in calls]
        yield seed, calls


def compared(calls):
    return [(name_of(call), arguments_of(call)) for call in calls]


def streamed(family, text, tools, seed):
    parser, events = Parser(family, tools), []
    for piece in pieces_of(text, random.Random(seed)):
        events += parser.add(piece)
    return [*events, *parser.finish()]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_renders_it_reads_back_in_any_pieces(name):
    family, count = FAMILIES[name], 0
    for seed, calls in cases(name):
        tools = declared(calls)
        events = streamed(family, family.render(calls), tools, seed)
        found = [event for event in events if isinstance(event, Found)]
        assert [f.problem for f in found] == [""] * len(calls), (seed, found)
        assert compared([f.call for f in found]) == compared(calls), seed
        assert not "".join(e.text for e in events if isinstance(e, Prose)).strip(), seed
        count += 1
    assert count > 10


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in AT_START])
def test_text_before_a_call_is_kept(name):
    family = FAMILIES[name]
    for seed, calls in list(cases(name))[:20]:
        text = f"I look it up: < [ {make_text(random.Random(seed))}"
        if any(word in text for word in family.opens) or "Action" in text:
            continue
        text += "\n"
        events = streamed(family, text + family.render(calls), declared(calls), seed)
        said = "".join(event.text for event in events if isinstance(event, Prose))
        assert said.strip() == text.strip(), seed
        assert compared(e.call for e in events if isinstance(e, Found)) == compared(calls)


@pytest.mark.parametrize("name", FAMILIES)
def test_incomplete_call_is_reported_and_not_completed(name):
    """At max_new_tokens an answer ends anywhere: calls before are kept, the open one is named."""
    family = FAMILIES[name]
    calls = [make_call("f", {"key_0": "a, b", "key_1": [1, 2]}), make_call("f", {"key_0": "c"})]
    text, tools = family.render(calls), declared(calls)
    whole = compared(calls)
    for end in range(len(text)):
        _, found = parse(family, text[:end], tools=tools)
        complete = compared(f.call for f in found if f.call is not None)
        assert complete == whole[: len(complete)], text[:end]
    broken = [
        f for end in range(len(text)) for f in parse(family, text[:end], tools=tools)[1]
        if f.problem
    ]  # fmt: skip
    assert broken


def test_the_end_of_an_answer_within_a_call():
    said, found = parse(load("hermes"), 'Yes.\n<tool_call>\n{"name": "f", "argum')
    assert said == "Yes.\n"
    assert [(f.call, f.problem) for f in found] == [(None, CUT_OFF)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>\n{'name': 'f'}\n</tool_call>", "is not valid JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "name: is missing"),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', "are not an object"),
        ('<tool_call>{"name": "f", "arguments": "{x"}</tool_call>', "not valid JSON"),
        ("<tool_call>f(1)</tool_call>", "is not valid JSON"),
        ('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', "is not valid JSON"),
    ],
    ids=["quotes", "no name", "a list", "text", "python", "nan"],
)
def test_a_wrong_call_is_named(text, problem):
    said, found = parse(load("hermes"), f"{text} and on")
    assert len(found) == 1 and found[0].call is None
    assert problem in found[0].problem
    assert said == " and on"


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_calls_is_text(name):
    answers = [
        '{"a": 1}',
        "[1, 2, 3]",
        "f is a function.\n\n```json\n{}\n```",
        "Hello <b>",
        "a < b",
    ]
    for answer in answers:
        events = streamed(FAMILIES[name], answer, [PROBE_TOOL], 1)
        assert all(isinstance(event, Prose) for event in events), answer
        assert "".join(event.text for event in events) == answer


def test_text_is_passed_on_as_soon_as_it_is_no_call():
    parser = Parser(load("hermes"))
    assert parser.add("Hello ") == [Prose("Hello ")]
    assert parser.add("<tool") == []
    assert parser.add("box> x") == [Prose("<toolbox> x")]


@pytest.mark.parametrize("name", ["hermes", "qwen_xml", "glm4_5", "internlm2", "mistral", "llama3"])
def test_the_family_is_found_by_what_a_template_renders(name):
    assert find(FAMILIES[name].render).name == name


def test_every_family_reads_the_probes():
    for family in FAMILIES.values():
        for calls in PROBES:
            _, found = parse(family, family.render(calls), tools=[PROBE_TOOL])
            assert compared(f.call for f in found) == compared(calls), family.name


def test_layouts_that_are_read_but_not_written():
    tools = [PROBE_TOOL]
    calls = {
        "mistral": '[TOOL_CALLS]look_up[CALL_ID]abc[ARGS]{"key": "x"}',
        "llama3": '<|python_tag|>{"name": "look_up", "parameters": {"key": "x"}}',
        "react": "Thought: hm\nAction: look_up\nAction Input: {'key': 'x'}",
        "moss": '<|Commands|>: look_up("x")<eoc>',
        "internlm2": '<|action_start|><|plugin|>{"name": "look_up", "parameters": {"key": "x"}}',
    }
    for name, text in calls.items():
        _, found = parse(load(name), text, tools=tools)
        assert compared(f.call for f in found) == [("look_up", {"key": "x"})], name


def test_constants_of_python_are_read_where_the_type_is_declared():
    kinds = {"on": {"type": "boolean"}, "at": {"type": ["integer", "null"]}, "why": {}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}]
    values = {"on": "True", "at": "None", "why": "None"}
    text = load("qwen_xml").render([make_call("f", values)])
    _, (found,) = parse(load("qwen_xml"), text, tools=tools)
    assert arguments_of(found.call) == {"on": True, "at": None, "why": "None"}


def test_code_of_internlm2_is_a_call_of_the_interpreter():
    code = "print('<|plugin|>')\n```\nx = 1"
    text = load("internlm2").render([make_call("python_interpreter", {"code": code})])
    assert text.startswith("<|action_start|><|interpreter|>\n```python\n")
    _, found = parse(load("internlm2"), text)
    assert arguments_of(found[0].call) == {"code": code}


def test_an_unknown_family_is_named():
    with pytest.raises(ConfigError, match="did you mean 'hermes'"):
        load("hermse")
