"""Tools in OpenAI's form: requests with tools, calls in answers, results in messages."""

import json

import openai
import pytest

from xtuner.calls.families import load
from xtuner.calls.read import make_call, read_tool
from xtuner.generation.answer import Answer
from xtuner.serve.replies import CallReader
from xtuner.types import Conversation, Message

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "W.", "parameters": SCHEMA},
}
ASK = {"role": "user", "content": "Weather in Rome and Oslo?"}
CALLS = [make_call("weather", {"city": city}) for city in ("Rome", "Oslo")]
SAID = "I look.\n" + load("hermes").render(CALLS)


@pytest.fixture
def scripted(monkeypatch):
    """Answers say SAID, five characters per token."""

    def take(self, scores):
        start = 5 * self.num_generated
        self.num_generated += 1
        self.ids.append(5)
        if start >= len(SAID):
            self.finish = "stop"
        return SAID[start : start + 5]

    monkeypatch.setattr(Answer, "take", take)


def asked(server, **more):
    name = server.models[0].name
    return server.client.chat.completions.create(
        model=name, messages=[ASK], tools=[TOOL], max_tokens=60, temperature=0, **more
    )


def test_calls_are_separated_from_text(server, scripted):
    (choice,) = asked(server).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    found = [(c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls]
    assert found == [("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"})]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_calls_of_a_stream_have_numbers(server, scripted):
    text, calls, finish = "", [], ""
    for chunk in asked(server, stream=True):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        finish = choice.finish_reason or finish
    assert (text.strip(), finish) == ("I look.", "tool_calls")
    assert [(call.index, json.loads(call.function.arguments)["city"]) for call in calls] == [
        (0, "Rome"), (1, "Oslo"),
    ]  # fmt: skip


def test_without_tools_the_text_is_as_it_is(server, scripted):
    for more in ({"tools": openai.omit}, {"tool_choice": "none"}):
        request = {"messages": [ASK], "tools": [TOOL], "max_tokens": 60, **more}
        answer = server.client.chat.completions.create(model=server.models[0].name, **request)
        assert answer.choices[0].message.content == SAID
        assert answer.choices[0].finish_reason == "stop"


def test_the_prompt_is_that_of_training(server, monkeypatch):
    prompts = []
    monkeypatch.setattr(server.engine, "submit", _recording(server.engine.submit, prompts))
    call = {
        "id": "x",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"R"}'},
    }
    turns = [ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "tool_call_id": "x", "content": "sunny"}]  # fmt: skip
    served = server.models[0]
    server.client.chat.completions.create(
        model=served.name, messages=turns, tools=[TOOL], max_tokens=1
    )
    messages = (
        Message("user", ASK["content"]),
        Message("assistant", "", tool_calls=(make_call("weather", {"city": "R"}, call_id="x"),)),
        Message("tool", "sunny", tool_call_id="x", name="weather"),
        Message("assistant", "It is sunny."),
    )
    trained = served.template.encode(Conversation(messages, (read_tool(TOOL),))).input_ids
    assert trained[: len(prompts[0])] == prompts[0]


def _recording(submit, prompts):
    def recorded(job):
        prompts.append(job.prompt)
        submit(job)

    return recorded


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tools": [{"type": "function"}]}, "name: is missing"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "assistant"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}]}, "but no call precedes it"),
    ],
    ids=["tool", "choice", "role", "result"],
)
def test_invalid_values_are_reported(server, change, words):
    request = {"messages": [ASK], "tools": [TOOL], **change}
    with pytest.raises(openai.BadRequestError, match=words):
        server.client.chat.completions.create(model=server.models[0].name, **request)


def test_unreadable_calls_stay_text():
    text, calls = CallReader(load("hermes"), ()).separated("a <tool_call>{x}</tool_call>")
    assert not calls and "{x}" in text
