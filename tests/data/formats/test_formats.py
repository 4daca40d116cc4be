"""The contract of every format, and what each reads from a row."""

import copy
import json
import re
import subprocess
import sys

import pytest

from xtuner.data import formats
from xtuner.data.formats import Format, RowError
from xtuner.data.formats._tools import read_tools
from xtuner.types import Conversation, Message, Text

EVERY = formats.load_all()
READ_OTHERWISE_BY_AUTO = {
    "alpaca_prompted": "alpaca",
    "colorist_described": "colorist",
}
"""Formats whose columns are those of another that 'auto' prefers; their results differ."""

MAY_BE_EMPTY = ("reference", "system_prompt", "meta_instruction")
"""Columns that tell a format, but may hold nothing."""
EMPTY = (None, "", "  ", [])


def by_name(format: Format) -> str:
    return format.name


def turns(record):
    return [(message.role, message.content) for message in record.messages]


def read(name, **row):
    return formats.load(name).convert(row)


@pytest.mark.parametrize("format", EVERY, ids=by_name)
def test_example_converts_with_its_columns(format):
    before = copy.deepcopy(format.example)
    record = format.convert(format.example)
    assert format.example == before
    assert set(format.columns) <= set(format.example)
    assert set(format.example) <= {*format.columns, *format.optional}
    assert "\n" not in format.description and len(format.description) < 79
    if isinstance(record, Conversation):
        assert any(m.supervised and (m.content or m.tool_calls) for m in record.messages)
        assert all("<|" not in message.content for message in record.messages)
    else:
        assert record == Text(format.example["text"])


@pytest.mark.parametrize("format", EVERY, ids=by_name)
def test_auto_reads_the_example_identically(format):
    picked = formats.resolve("auto", columns=tuple(format.example), sample=format.example)
    if format.name in READ_OTHERWISE_BY_AUTO:
        assert picked.name == READ_OTHERWISE_BY_AUTO[format.name]
    else:
        assert picked.convert(format.example) == format.convert(format.example)


@pytest.mark.parametrize("format", EVERY, ids=by_name)
@pytest.mark.parametrize("value", ["missing", None, "", "  ", 7, [], {}, [None], {"turn_1": 3}])
def test_bad_required_column_is_named(format, value):
    for column in format.columns:
        row = {**format.example, column: value}
        if value == "missing":
            del row[column]
        if column in MAY_BE_EMPTY and value in ("missing", *EMPTY):
            continue
        with pytest.raises(RowError) as caught:
            format.convert(row)
        assert caught.value.field.startswith(column)
        assert caught.value.problem and caught.value.hint


@pytest.mark.parametrize("format", EVERY, ids=by_name)
@pytest.mark.parametrize("value", [None, ""])
def test_optional_column_may_be_empty(format, value):
    bare = {k: v for k, v in format.example.items() if k in format.columns}
    for column in format.optional:
        assert format.convert({**bare, column: value}) == format.convert(bare)


def test_column_that_tells_a_format_may_be_empty():
    for value in EMPTY[:3]:
        record = read("openorca", system_prompt=value, question="q", response="a")
        assert turns(record) == [("user", "q"), ("assistant", "a")]
    for value in (None, "", []):
        record = read("law", reference=value, question="q", answer="a")
        assert turns(record) == [("user", "q"), ("assistant", "a")]


def test_texts_keep_white_space_and_unicode():
    said = "  def f():\n\treturn '你好 🙂'\u00a0\n"
    assert turns(read("io", input=said, output=said)) == [("user", said), ("assistant", said)]
    assert read("pretrain", text=said) == Text(said)


def test_openai_loss_names_and_roles():
    record = read(
        "openai",
        messages=[
            {"role": "developer", "content": ""},
            {"role": "user", "content": "a", "loss": False, "name": None},
            {"role": "assistant", "content": "b", "loss": False},
            {"role": "user", "content": "c", "name": "Ann"},
            {"role": "assistant", "content": "d", "weight": 0},
            {"role": "assistant", "content": "e", "weight": 1},
        ],
    )
    assert [m.role for m in record.messages][:3] == ["system", "user", "assistant"]
    assert [m.supervised for m in record.messages] == [False] * 5 + [True]
    assert record.messages[3].name == "Ann"


@pytest.mark.parametrize("key", ["loss", "train", "training", "weight"])
def test_every_name_of_supervision_is_read_in_every_format_with_turns(key):
    def supervised(record):
        return [m.supervised for m in record.messages if m.role == "assistant"]

    ask, no, yes = {"role": "user", "content": "a"}, {key: False}, {key: True}
    said = [{"role": "assistant", "content": "b", **each} for each in (no, yes)]
    assert supervised(read("openai", messages=[ask, *said])) == [False, True]
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **no},
             {"from": "gpt", "value": "c", **yes}]  # fmt: skip
    for name in ("sharegpt", "llava", "msagent"):
        assert supervised(read(name, conversations=turns)) == [False, True]
    pairs = [{"input": "a", "output": "b", **no}, {"input": "a", "output": "b", **yes}]
    assert supervised(read("xtuner", conversation=pairs)) == [False, True]


def test_output_with_loss_of_xtuner_0_1_is_read():
    said = [{"input": "a", "output": "b", "output_with_loss": on} for on in (False, True, None)]
    record = read("xtuner", conversation=said)
    assert [m.supervised for m in record.messages] == [False, False, False, True, False, True]


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_a_weight_may_be_a_fraction(key):
    def weights(record):
        said = [m for m in record.messages if m.role == "assistant"]
        return [(m.supervised, m.weight) for m in said]

    each, expected = [0.5, 0, 2, None], [(True, 0.5), (False, 1.0), (True, 2.0), (True, 1.0)]
    said = [{"role": "assistant", "content": "b", key: weight} for weight in each]
    assert weights(read("openai", messages=[{"role": "user", "content": "a"}, *said])) == expected
    turns = [
        {"from": "human", "value": "a"},
        *({"from": "gpt", "value": "b", key: w} for w in each),
    ]
    for name in ("sharegpt", "llava", "msagent"):
        assert weights(read(name, conversations=turns)) == expected
    pairs = [{"input": "a", "output": "b", key: weight} for weight in each]
    assert weights(read("xtuner", conversation=pairs)) == expected


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"weight": -0.5}, r"weight: is -0.5; it must be 0, or a number from 1e-06 to 1e\+06"),
        ({"weight": float("nan")}, "weight: is nan"),
        ({"loss_weight": "0.5"}, "loss_weight: is '0.5'"),
        ({"loss": 0.5}, "loss: is 0.5; it must be true or false"),
        ({"weight": 0.5, "loss_weight": 0.6}, "weight: weight and loss_weight disagree"),
        ({"weight": 0.5, "train": False}, "train: train and weight disagree"),
        ({"role": "user", "weight": 0.5}, "weight: is 0.5 in a turn of 'user'"),
    ],
    ids=["negative", "nan", "text", "loss", "two", "train", "user"],
)
def test_a_weight_that_is_not_allowed_is_named(turn, said):
    turn = {"role": "assistant", "content": "b", **turn}
    with pytest.raises(RowError) as caught:
        read("openai", messages=[{"role": "user", "content": "a"}, turn])
    assert re.search(said, f"{caught.value.field}: {caught.value.problem}; {caught.value.hint}")


def test_supervision_that_disagrees_with_itself_is_named():
    turn = {"role": "assistant", "content": "b", "train": True, "weight": 0}
    with pytest.raises(RowError, match=r"train: train and weight disagree"):
        read("openai", messages=[{"role": "user", "content": "a"}, turn])


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_of_the_assistant_is_read(key):
    ask = {"role": "user", "content": "a"}
    messages = [ask, {"role": "assistant", "content": "b", key: "I think."}]
    record = read("openai", messages=messages)
    assert record.messages[1].reasoning == "I think."
    assert record.messages[1].as_dict()["reasoning_content"] == "I think."
    with pytest.raises(RowError, match=rf"messages\[0\].{key}.*only assistant turns"):
        read("openai", messages=[{**ask, key: "x"}, messages[1]])


def test_messages_may_be_text_of_json_or_python():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = read("openai", messages=messages)
    for text in (json.dumps(messages), str(messages)):
        assert read("openai", messages=text) == expected
    with pytest.raises(RowError, match="messages: is text that is not a list; write it as JSON"):
        read("openai", messages="[{'role': ...}")


def test_prompt_and_completion_may_be_lists_of_messages():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
              {"role": "user", "content": "c"}]  # fmt: skip
    completion = [{"role": "assistant", "content": "d"}]
    record = read("code_alpaca", prompt=prompt, completion=completion)
    assert [m.content for m in record.messages if m.supervised] == ["d"]
    assert turns(record)[:3] == [("user", "a"), ("assistant", "b"), ("user", "c")]
    assert read("code_alpaca", prompt="[{1}] is what?", completion="a set").messages[0].content
    with pytest.raises(RowError, match=r"completion\[0\].role: is 'user'"):
        read("code_alpaca", prompt=prompt, completion=prompt)


def test_function_call_is_a_call():
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    rows = [
        [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, **given}]
        for given in ({"function_call": call}, {"tool_calls": [{"function": call}]})
    ]
    old, new = (read("openai", messages=messages) for messages in rows)
    assert old == new and old.messages[1].tool_calls[0]["function"]["arguments"]["city"] == "Oslo"
    both = {"role": "assistant", "function_call": call, "tool_calls": [call]}
    with pytest.raises(RowError, match="is given together with tool_calls"):
        read("openai", messages=[rows[0][0], both])


def test_functions_of_the_time_of_function_calls_are_tools():
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    (tool,) = read("openai", messages=messages, functions=[function]).tools
    assert tool == {"type": "function", "function": function}


def test_nulls_in_the_schema_of_a_tool_are_absent_keys():
    city = {"type": "string", "enum": None, "description": None, "default": None}
    parameters = {"type": "object", "properties": {"city": city}, "required": None}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (found,) = read_tools({"tools": [tool]})
    assert found["function"]["parameters"] == {
        "type": "object",
        "properties": {"city": {"type": "string", "default": None}},
    }


def test_openai_calls_and_tools_from_json_text_equal_those_from_objects():
    def row(arguments, tools):
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
        return {
            "messages": [
                {"role": "user", "content": "2 + 3?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "", "tool_call_id": "c1"},
                {"role": "assistant", "content": "5"},
            ],
            "tools": tools,
        }

    schema = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
    record = read("openai", **row({"a": 2}, [tool]))
    assert record == read("openai", **row('{"a": 2}', '[{"type": "function", "function": '
                                           '{"name": "add", "parameters": {}}}]'))  # fmt: skip
    assert record.tools == (tool,)
    function = {"name": "add", "arguments": {"a": 2}}
    assert record.messages[1].tool_calls == (
        {"type": "function", "id": "c1", "function": function},
    )
    assert record.messages[1].content == ""
    assert record.messages[2].tool_call_id == "c1"


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "bot", "content": "a"}, "messages[1].role"),
        ({"role": ["user"], "content": "a"}, "messages[1].role"),
        ({"content": "a"}, "messages[1].role"),
        ({"role": "assistant", "content": " "}, "messages[1].content"),
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
        ({"role": "user", "content": [{"type": "audio"}]}, "messages[1].content[0].type"),
        (
            {"role": "user", "content": [{"type": "image", "path": 3}]},
            "messages[1].content[0].path",
        ),
        ({"role": "assistant", "content": "a", "loss": "no"}, "messages[1].loss"),
        ({"role": "assistant", "content": "a", "loss": []}, "messages[1].loss"),
        ({"role": "user", "content": "a", "loss": True}, "messages[1].loss"),
        ({"role": "assistant", "tool_calls": "{x"}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls[0].name"),
        ("hello", "messages[1]"),
        ({"role": "user", "content": "a"}, "messages"),
    ],
)
def test_openai_names_the_bad_part(turn, field):
    with pytest.raises(RowError) as caught:
        read("openai", messages=[{"role": "user", "content": "q"}, turn])
    assert caught.value.field == field


def test_sharegpt_functions_system_and_misspelling():
    said = [
        {"from": "human", "value": "2 + 3?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "5"},
    ]
    record = read("sharegpt", conversation=said, system="Be brief.", tools='[{"name": "add"}]')
    assert [m.role for m in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2].tool_calls[0]["function"] == {"name": "add", "arguments": {"a": 2}}
    assert [tool["function"]["name"] for tool in record.tools] == ["add"]
    with pytest.raises(RowError, match=r"conversations\[0\].from: is 'alien'"):
        read("sharegpt", conversations=[{"from": "alien", "value": "x"}])
    with pytest.raises(RowError, match="'messages'"):
        read("sharegpt", conversations=[{"role": "user", "content": "x"}])
    with pytest.raises(RowError, match="keep one"):
        read("sharegpt", conversations=[{"from": "system", "value": "x"}, *said], system="y")


def test_alpaca_history_comes_between_system_and_question():
    record = read("alpaca", instruction="Name it", input="a lemon", output="Lemon",
                  system="S", history=[["q", "a"]])  # fmt: skip
    assert turns(record) == [
        ("system", "S"), ("user", "q"), ("assistant", "a"),
        ("user", "Name it\na lemon"), ("assistant", "Lemon"),
    ]  # fmt: skip
    with pytest.raises(RowError) as caught:
        read("alpaca", instruction="i", output="o", history=[["q"]])
    assert caught.value.field == "history[0]"


def test_xtuner_takes_system_from_the_first_exchange_only():
    exchange = {"input": "a", "output": "b"}
    first = {"system": "S", **exchange}
    assert len(read("xtuner", conversation=[first, exchange]).messages) == 5
    with pytest.raises(RowError) as caught:
        read("xtuner", conversation=[exchange, first])
    assert caught.value.field == "conversation[1].system"


def test_oasst1_cuts_at_markers_only():
    said = "### Human: Use a ### heading, or #### Human: so\n### Assistant: OK.\n### Human: Bye"
    assert turns(read("oasst1", text=said)) == [
        ("user", "Use a ### heading, or #### Human: so"), ("assistant", "OK."), ("user", "Bye"),
    ]  # fmt: skip
    for bad in (
        "Once upon a time",
        "Hi ### Human: a### Assistant: b",
        "### Human: a### Assistant:",
    ):
        with pytest.raises(RowError):
            read("oasst1", text=bad)


def test_moss_orders_turns_by_number_and_keeps_results_out_of_the_answers():
    chat = {
        f"turn_{n}": {"Human": f"<|Human|>: q{n}<eoh>\n", "MOSS": f"<|MOSS|>: a{n}<eom>\n"}
        for n in (1, 10, 2)
    }
    chat["turn_3"] = None
    chat["turn_2"] |= {"Commands": '<|Commands|>: Search("x")<eoc>\n',
                       "Tool Responses": "<|Results|>:\nfound<eor>\n"}  # fmt: skip
    assert turns(read("moss", meta_instruction="M", chat=chat)) == [
        ("system", "M"), ("user", "q1"), ("assistant", "a1"),
        ("user", "q2"), ("assistant", ""), ("tool", "found"), ("assistant", "a2"),
        ("user", "q10"), ("assistant", "a10"),
    ]  # fmt: skip


def test_msagent_reads_text_as_json_and_as_python_and_splits_results():
    import json

    called = '<|startofthink|>{"api_name": "add", "parameters": {"a": 2, "b": 3}}<|endofthink|>'
    said = f"I add.{called}<|startofexec|>5<|endofexec|>It is 5."
    example = {"conversations": [{"from": "user", "value": "What is 2 + 3?"},
                                 {"from": "assistant", "value": said}]}  # fmt: skip
    record = formats.load("msagent").convert(example)
    assert turns(record) == [
        ("user", "What is 2 + 3?"), ("assistant", "I add."),
        ("tool", "5"), ("assistant", "It is 5."),
    ]  # fmt: skip
    for stored in (json.dumps, repr):
        assert read("msagent", conversations=stored(example["conversations"])) == record
    with pytest.raises(RowError):
        read("msagent", conversations="__import__('os').getcwd()")


def test_law_shows_the_paragraphs_before_the_question():
    record = read("law", question="Q", reference=["A", "B"], answer="C")
    assert turns(record) == [("user", "A\nB\nQ"), ("assistant", "C")]


def test_folder_needs_no_heavy_library():
    code = (
        "import sys; from xtuner.data import formats; formats.load_all();"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_messages_are_of_the_shared_type():
    assert read("io", input="a", output="b").messages[0] == Message("user", "a")


def test_llava_assigns_images_to_placeholders():
    turns_ = [
        {"from": "human", "value": "<image>\n<image>\nWhich is older?"},
        {"from": "gpt", "value": "The first."},
        {"from": "human", "value": "And this? <image>"},
        {"from": "gpt", "value": "Younger."},
    ]
    record = read("llava", image=["a.png", "b.png", "c.png"], conversations=turns_)
    assert [m.images for m in record.messages] == [("a.png", "b.png"), (), ("c.png",), ()]
    assert record.images == ("a.png", "b.png", "c.png")
    assert record.messages[0].content == "<image>\n<image>\nWhich is older?"
    assert read("llava", image="a.png", conversation=turns_[2:]).images == ("a.png",)
    assert read("llava", conversations=[turns_[1] | {"from": "human"}, turns_[1]]).images == ()


@pytest.mark.parametrize(
    ("image", "value", "words"),
    [
        (["a", "b"], "<image> Hi", "has 1 <image> placeholder for 2 images"),
        ("a", "Hi", "has 0 <image> placeholders for 1 image"),
        ("a", "<image><image>", "has 2 <image> placeholders for 1 image"),
        (7, "<image>", "is a number"),
        ([7], "<image>", "is a number"),
    ],
)
def test_llava_reports_different_numbers_of_placeholders_and_images(image, value, words):
    rows = [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}]
    with pytest.raises(RowError, match=words):
        read("llava", image=image, conversations=rows)


def test_llava_rejects_an_image_in_an_answer():
    rows = [{"from": "human", "value": "Draw"}, {"from": "gpt", "value": "<image>"}]
    with pytest.raises(RowError, match="in an assistant turn"):
        read("llava", image="a.png", conversations=rows)


def test_openai_reads_images_in_all_their_forms():
    answer = {"role": "assistant", "content": "Two cats."}

    def images(content, **row):
        record = read("openai", messages=[{"role": "user", "content": content}, answer], **row)
        return record.messages[0].content, record.images

    ask = {"type": "text", "text": "What is it?"}
    wanted = "<image>\nWhat is it?", ("a.png",)
    assert (
        images([{"type": "image", "value": "a.png"}, {"type": "text", "value": ask["text"]}])
        == wanted
    )
    assert images([{"type": "image_url", "image_url": {"url": "a.png"}}, ask]) == wanted
    assert images([{"type": "image", "image": "a.png"}, ask]) == wanted
    assert images([{"type": "image"}, ask], images=["a.png"]) == wanted
    assert images("<image>\nWhat is it?", images="a.png") == wanted
    both = [{"type": "image"}, {"type": "image", "path": "b.png"}, ask]
    assert images(both, images=["a.png"])[1] == ("a.png", "b.png")
    assert images("An <image> tag of HTML") == ("An <image> tag of HTML", ())
    for content, row in (([{"type": "image"}, ask], {}), ("Hi", {"images": ["a.png"]})):
        with pytest.raises(RowError, match=r"for [01] image"):
            images(content, **row)
