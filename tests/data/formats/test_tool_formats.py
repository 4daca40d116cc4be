"""Every format with tools gives the same representation of calls, results and tools."""

import json

import pytest

from xtuner.calls.check import CallPolicy, Problem, call_problems
from xtuner.calls.read import arguments_of, name_of
from xtuner.data import formats
from xtuner.data.formats import RowError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
TOOL = {"name": "add", "description": "Add two numbers.", "parameters": SCHEMA}
CALL = {"name": "add", "arguments": {"a": 2, "b": 3}}
ASK = "What is 2 + 3?"
PLUGIN = {
    "plugin_name": "add",
    "plugin_schema_for_model": {
        "name": "add",
        "paths": [
            {"name": "add", "description": "Add.", "method": "post", "parameters": [
                {"name": "a", "description": "One.", "required": "True"},
                {"name": "b", "description": "Other.", "required": "False"},
            ]},
        ],
    },
}  # fmt: skip
THINK = '<|startofthink|>```JSON\n{"api_name": "add", "parameters": {"a": 2, "b": 3}}\n```'
REACT = 'Thought: I add.\nAction: add\nAction Input: {"a": 2, "b": 3}'


def from_value(*pairs):
    return [{"from": name, "value": value} for name, value in pairs]


ROWS = {
    "openai": {
        "messages": [
            {"role": "user", "content": ASK},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function",
                 "function": {"name": "add", "arguments": json.dumps(CALL["arguments"])}},
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "5"},
            {"role": "assistant", "content": "It is 5."},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "sharegpt": {
        "conversations": from_value(
            ("human", ASK), ("function_call", json.dumps(CALL)), ("observation", "5"),
            ("gpt", "It is 5."),
        ),
        "tools": json.dumps([TOOL]),
    },
    "glaive": {
        "system": "SYSTEM: You are a helpful assistant with access to the following functions. "
        f"Use them if required -\n{json.dumps(TOOL, indent=4)}\n",
        "chat": f"USER: {ASK}\n\n\nASSISTANT: <functioncall> {{\"name\": \"add\", \"arguments\": "
        f"'{json.dumps(CALL['arguments'])}'}} <|endoftext|>\n\n\nFUNCTION RESPONSE: 5\n\n\n"
        "ASSISTANT: It is 5. <|endoftext|>\n\n\n",
    },
    "hermes": {
        "conversations": from_value(
            ("system", f"You may call functions: <tools>{[{'type': 'function', 'function': TOOL}]}"
             "</tools>"),
            ("human", ASK),
            ("gpt", f"<tool_call>\n{CALL}\n</tool_call>"),  # in Python's quotes, as in the data
            ("tool", "<tool_response>\n5\n</tool_response>"), ("gpt", "It is 5."),
        ),
    },
    "toolbench": {
        "conversations": from_value(
            ("system", f"You have access to the following APIs: {[TOOL]}"),
            ("user", ASK), ("assistant", REACT), ("function", "5"), ("assistant", "It is 5."),
        ),
    },
    "agent_flan": {
        "conversation": [
            {"role": "system", "content": f"You have access to the following tools:\n{[TOOL]}"},
            {"role": "user", "content": ASK, "loss": False},
            {"role": "assistant", "content": REACT, "loss": True},
            {"role": "user", "content": "Response: 5", "loss": False},
            {"role": "assistant", "content": "Final Answer: It is 5.", "loss": True},
        ]
    },
    "msagent": {
        "conversations": repr(from_value(
            ("system", f"你是助手。当前对话可以使用的插件信息如下 1. {json.dumps(PLUGIN)} "),
            ("user", ASK),
            ("assistant", f"I add.{THINK}<|endofthink|>\n\n<|startofexec|>```JSON\n5\n```"
             "<|endofexec|>\nIt is 5."),
        )),
    },
    "moss": {
        "meta_instruction": "You are MOSS.\n- Calculator: enabled. API: add(a, b)\n"
        "- Web search: disabled.\n",
        "chat": {"turn_1": {
            "Human": f"<|Human|>: {ASK}<eoh>\n",
            "Inner Thoughts": "<|Inner Thoughts|>: I add.<eot>\n",
            "Commands": "<|Commands|>: add(2, 3)<eoc>\n",
            "Tool Responses": "<|Results|>:\nadd(2, 3) =>\n5\n<eor>\n",
            "MOSS": "<|MOSS|>: It is 5.<eom>\n",
        }},
    },
}  # fmt: skip


def convert(row):
    return formats.resolve("auto", columns=tuple(row), sample=row).convert(row)


@pytest.mark.parametrize("name", ROWS)
def test_auto_reads_every_layout_as_the_same_calls(name):
    row = ROWS[name]
    assert formats.resolve("auto", columns=tuple(row), sample=row).name == name
    record = CallPolicy(errors="keep").applied(convert(row))
    said = [m for m in record.messages if m.role != "system"]
    assert [m.role for m in said] == ["user", "assistant", "tool", "assistant"]
    assert [(name_of(c), arguments_of(c)) for c in said[1].tool_calls] == [
        ("add", {"a": 2, "b": 3})
    ]
    assert said[1].content in ("", "I add.")
    assert (said[2].content, said[2].name) == ("5", "add")
    assert said[2].tool_call_id == said[1].tool_calls[0]["id"]
    assert said[3].content == "It is 5."
    (tool,) = record.tools
    assert tool["type"] == "function" and name_of(tool) == "add"
    assert list(tool["function"]["parameters"]["properties"]) == ["a", "b"]
    assert name == "moss" or not list(call_problems(record))


def test_the_first_row_that_tells_decides_for_the_file():
    plain = {"conversations": from_value(("human", "Hi"), ("gpt", "Hello"))}
    rows = [plain, plain, ROWS["hermes"]]
    assert formats.recognised_row(rows, ("conversations",)) is ROWS["hermes"]
    assert formats.recognised_row(rows[:2], ("conversations",)) is plain


def test_xlam_reads_several_calls_and_types_of_python():
    record = formats.load("xlam").convert(
        {
            "query": "Weather in Paris and Rome?",
            "answers": json.dumps([
                {"name": "weather", "arguments": {"city": "Paris"}},
                {"name": "weather", "arguments": {"city": "Rome", "days": 3}},
            ]),
            "tools": json.dumps([{"name": "weather", "description": "Weather.", "parameters": {
                "city": {"type": "str", "description": "A city."},
                "days": {"type": "int, optional", "description": "Days.", "default": "1"},
            }}]),
        }
    )  # fmt: skip
    parameters = record.tools[0]["function"]["parameters"]
    assert parameters["required"] == ["city"]
    assert [p["type"] for p in parameters["properties"].values()] == ["string", "integer"]
    assert len(record.messages[1].tool_calls) == 2 and not list(call_problems(record))
    ids = [call["id"] for call in CallPolicy().applied(record).messages[1].tool_calls]
    assert ids == ["call00001", "call00002"]


def test_moss_splits_the_results_of_several_commands():
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Commands": '<|Commands|>: Search("a"), Search("b, (c)")<eoc>\n',
        "Tool Responses": '<|Results|>:\nSearch("a") =>\none\nSearch("b, (c)") =>\ntwo\n<eor>\n',
        "MOSS": "<|MOSS|>: x<eom>\n",
    }
    meta = "M\n- Web search: enabled. API: Search(query)\n"
    record = formats.load("moss").convert({"meta_instruction": meta, "chat": {"turn_1": turn}})
    said = record.messages[2:]
    assert [arguments_of(c) for c in said[0].tool_calls] == [{"query": "a"}, {"query": "b, (c)"}]
    assert [m.content for m in said[1:3]] == ["one", "two"]
    turn["Commands"] = '<|Commands|>: Search("what is "x"?")<eoc>\n'
    record = formats.load("moss").convert({"meta_instruction": meta, "chat": {"turn_1": turn}})
    assert arguments_of(record.messages[2].tool_calls[0]) == {"query": 'what is "x"?'}
    turn["Commands"] = "<|Commands|>: look it up<eoc>\n"
    with pytest.raises(RowError, match="Commands: is not a call"):
        formats.load("moss").convert({"meta_instruction": meta, "chat": {"turn_1": turn}})


def openai(call, *more, tools=(TOOL,)):
    messages = [{"role": "user", "content": ASK}, *more]
    if call is not None:
        turn = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "function": call}]}
        messages.insert(1, turn)
    messages.append({"role": "assistant", "content": "It is 5."})
    return convert({"messages": messages, "tools": list(tools)})


RESULT = {"role": "tool", "content": "5"}
BAD = {
    "arguments are no JSON": (openai({"name": "add", "arguments": '{"a": 2,'}), "not valid JSON"),
    "arguments are a list": (openai({"name": "add", "arguments": [2]}), "are not an object"),
    "unknown tool": (openai({"name": "sub", "arguments": {}}), "does not declare"),
    "wrong type": (openai({"name": "add", "arguments": {"a": "2"}}), "a must be an integer"),
    "unknown argument": (openai({"name": "add", "arguments": {"c": 2}}), "c is not a parameter"),
    "result without a call": (openai(None, RESULT), "no call precedes it"),
    "result of another call": (
        openai(CALL, {**RESULT, "tool_call_id": "c2"}), "no call with that id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_reported_with_a_hint_and_dropped_or_kept(name):
    record, words = BAD[name]
    problem = CallPolicy().applied(record)
    assert isinstance(problem, Problem)
    assert words in problem.problem and problem.hint
    assert problem.where.startswith(("turn [2]", "turn [3]"))
    kept = CallPolicy(errors="keep").applied(record)
    assert len(kept.messages) == len(record.messages)


def test_rows_without_declared_tools_are_not_compared_with_any():
    assert not list(call_problems(openai({"name": "sub", "arguments": {}}, tools=())))


def test_parallel_results_are_linked_by_id_or_order():
    calls = [{"id": i, "function": CALL} for i in ("x", "y")]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    for ids, order in ((("y", "x"), ["y", "x"]), ((None, None), ["x", "y"])):
        results = [{"role": "tool", "content": "5", "tool_call_id": i} for i in ids]
        end = {"role": "assistant", "content": "5"}
        messages = [{"role": "user", "content": ASK}, turn, *results, end]
        record = CallPolicy().applied(convert({"messages": messages, "tools": [TOOL]}))
        assert [m.tool_call_id for m in record.messages if m.role == "tool"] == order


def test_thoughts_are_learned_masked_or_removed():
    record = convert(ROWS["toolbench"])
    learned, masked, removed = (
        CallPolicy(thoughts=value).applied(record).messages[1]
        for value in ("learn", "mask", "remove")
    )
    assert (learned.content, learned.mask_thought) == ("I add.", False)
    assert (masked.content, masked.mask_thought) == ("I add.", True)
    assert (removed.content, removed.mask_thought) == ("", False)
