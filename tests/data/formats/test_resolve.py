"""Resolving a format by name, by columns, or in a user's file."""

import pickle
from dataclasses import replace

import pytest

from xtuner.data.formats import RowError, load, load_all, names, resolve
from xtuner.errors import ConfigError, DataError
from xtuner.types import Conversation, Text


def test_every_file_is_a_format_of_its_name():
    assert [format.name for format in load_all()] == names()
    assert {"openai", "sharegpt", "alpaca", "pretrain"} <= set(names())


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("messages id", "openai"),
        ("messages text", "openai"),
        ("instruction input output text", "alpaca"),
        ("instruction output", "alpaca"),
        ("instruction output history", "alpaca"),
        ("instruction input output instruction_zh input_zh output_zh", "alpaca_zh"),
        ("id system_prompt question response", "openorca"),
        ("question response", "stack_exchange"),
        ("conversations tools", "sharegpt"),
        ("conversation", "xtuner"),
        ("text", "pretrain"),
    ],
)
def test_auto_selects_the_format_that_reads_most_columns(columns, name):
    assert resolve("auto", columns=columns.split()).name == name


def test_auto_distinguishes_equal_columns_by_a_row():
    def pick(**row):
        return resolve("auto", columns=tuple(row), sample=row).name

    assert pick(text="### Human: a### Assistant: b") == "oasst1"
    assert pick(text="Once upon a time") == "pretrain"
    assert pick(text=None) == "pretrain"
    assert pick(conversation=[{"input": "a", "output": "b"}]) == "xtuner"
    assert pick(conversation=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == (
        "sharegpt"
    )
    python = "[{'from': 'user', 'value': 'a'}, {'from': 'assistant', 'value': 'b'}]"
    assert pick(conversations=python) == "msagent"


def test_misfit_names_the_format_that_fits():
    with pytest.raises(DataError) as caught:
        resolve("openai", columns=("conversations", "id"))
    assert str(caught.value) == (
        "format 'openai' expects 'messages', found 'conversations', 'id'.\n"
        "  These columns match format 'sharegpt': set dataset_format = 'sharegpt'."
    )


@pytest.mark.parametrize("name", ["auto", "openai"])
@pytest.mark.parametrize(
    ("columns", "near"),
    [
        (("instruction", "body"), "'alpaca' (missing 'output')"),
        (("mesages",), "'openai' (missing 'messages')"),
        (("zzz",), "No format has any"),
        ((), "no columns"),
    ],
)
def test_no_fit_lists_columns_and_the_nearest(name, columns, near):
    with pytest.raises(DataError) as caught:
        resolve(name, columns=columns)
    assert near in str(caught.value) and "my_format.py:to_messages" in str(caught.value)
    assert all(repr(column) in str(caught.value) for column in columns)


def test_unknown_name_gets_a_guess():
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        resolve("alpacca", columns=())


def own(folder, body, name="to_messages"):
    (folder / f"{folder.name}.py").write_text(f"def to_messages(row):\n    {body}\n")
    return resolve(f"{folder.name}.py:{name}", columns=("a",), folder=folder)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("return [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': row['a']}]",
         Conversation),
        ("from xtuner.types import Message as M; return [M('assistant', row['a'])]", Conversation),
        ("from xtuner.data.formats.base import exchange; return exchange('q', row['a'])",
         Conversation),
        ("return row['a']", Text),
        ("from xtuner.types import Text; return Text(row['a'])", Text),
    ],
)  # fmt: skip
def test_own_function(tmp_path, body, kind):
    format = own(tmp_path, body)
    record = format.convert({"a": "hello"})
    assert isinstance(record, kind) and "hello" in repr(record)
    with pytest.raises(RowError):
        format.convert({"a": ""})
    with pytest.raises(RowError):
        format.convert({})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return row['b']", "to_messages raised KeyError: 'b'"),
        ("raise ValueError('the date is wrong')", "the date is wrong"),
        ("return None", "returned NoneType; it must return a list"),
        ("return {'role': 'user'}", "returned dict"),
        ("return []", "returned an empty list"),
        ("return [1]", "to_messages[0]: is a number"),
        ("return [{'role': 'user', 'content': 'q'}]", "has no assistant turn"),
    ],
)
def test_own_function_at_fault(tmp_path, body, words):
    with pytest.raises(RowError) as caught:
        own(tmp_path, body).convert({"a": "x"})
    assert words in str(caught.value)


def test_own_name_must_be_a_function(tmp_path):
    with pytest.raises(ConfigError, match="must be a function"):
        own(tmp_path, "pass\nnumber = 3", name="number")


def test_row_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RowError("a[1]", "is empty", "fill it in")))
    assert (error.field, error.problem, error.hint) == ("a[1]", "is empty", "fill it in")
    assert isinstance(error, DataError) and str(error) == "a[1]: is empty; fill it in"
    assert pickle.loads(pickle.dumps(load("openai"))) == replace(load("openai"))
