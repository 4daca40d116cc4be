"""A syntax error is the only problem reported, with hints for common ones."""

import ast

import pytest

from xtuner.config.load import load_settings
from xtuner.errors import ConfigError


def problem(tmp_path, text, suffix, *, given=""):
    file = tmp_path / f"settings{suffix}"
    file.write_text(given + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_settings(file, overrides=["max_epochs=2"])
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data_path = “my.csv”", 'write " instead of the full-width character “'),
        ("data_path = ['a.csv'，'b.csv']", "write , instead of the full-width character ，"),
        ("lr\u3000= 1e-4", "write a space instead of a full-width space"),
        ("SYSTEM = 'a’", "a quote is not closed; write ' instead of the full-width character ’"),
        ('data_path = "C:\\Users\\a.csv"', "write the path with /"),
        ('data_path = "C:\\data\\"', "write the path with /"),
        ("data_path = 'a.csv", "a quote is opened and not closed"),
        ("lr = 1e-4\n  max_epochs = 2", "begin the line without spaces or tabs"),
        ("data_path = ['a.csv'\nlr = 1e-4", "add the closing bracket"),
        ("max_epochs 2", "write name = value"),
        ("lr = 1e−4", "write - instead of the minus sign −"),
        ("batch-size = 4", "write batch_size"),
        ("batch_size = 08", "write the number without leading zeros"),
        ("batch_size =", "write a value after ="),
        ("columns = {'a': 'user' 'b': 'assistant'}", "write a comma between the two items"),
        ("columns = {\n 'a': 'user'\n 'b': 'assistant'}", "write a comma between the two items"),
        ("betas = (0.9, 0.99))", "each bracket needs one of the same kind"),
        ("lr = １e-4", "write 1 instead of the full-width character １"),
        ("data_path = `a`", "write ' instead of the backtick `"),
        ("\u200blr = 1", "remove the invisible character U+200B"),
        ("max_length = 2,048", "; write 2048"),
        ("max_length = 2k", "write numbers in digits, and text in quotes"),
        ("validation_ratio = 5%", "write the share as a number: 0.05"),
        ("save_steps = 10%", "write a number without %"),
        ("batch_size = 4\n# the rate\n'lr' = 1e-4", "write the name without quotes: lr ="),
        ("x = [\n 'a' # it's\n # one (\n 'b']\ny z", "write name = value"),
        ("columns = {\n 'a': 'user'  # a\n # b,\n 'b': 'assistant'}", "write a comma between"),
        ("lr = 1 // the rate", "a comment begins with #"),
        ("data_path = ./a.csv", "write the path in quotes"),
        ("<" * 7 + " HEAD\nlr = 1e-4", "a merge conflict marker"),
    ],
    ids=lambda value: None,
)
def test_hints_for_python_syntax_errors(tmp_path, text, hint):
    message = problem(tmp_path, text, ".py")
    assert hint in message and message.startswith("1 problem in") and "is missing" not in message


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data_path: a.csv\n\tlr: 1", "the line has a tab; YAML takes spaces only"),
        ('data_path: "C:\\Users\\a.csv"', "write the path with /"),
        ("data_path：a.csv", "write : instead of the full-width character ："),
        ("data_path = a.csv", "must end in .py"),
        ("data_path: [a.csv，b.csv", "write , instead of the full-width character ，"),
        ('a: 1\ndata_path: "a.csv\nlr: 1', 'line 2  data_path: "a.csv   is not YAML: found'),
        ('data_path: "a.csv\nlr: 1', "a quote is opened and not closed"),
        ("a: 1\ndata_path: [a.csv\nlr: 1", "line 2  data_path: [a.csv   is not YAML: expected"),
        ("data_path: [a.csv\nlr: 1", "add the closing bracket ]"),
        ("model：m\nlr: 1", "line 1  model：m   is not YAML: mapping values are not allowed"),
        ("model：m\nlr: 1", "write : instead of the full-width character ："),
        ("model: m\nlr:1\n", "write a space after the colon"),
        ("model: m\n lr: 1", "begin the line without spaces"),
        ("model: 'it's'", "write the value in quotes of the other kind"),
        ("model: @m", "write quotes around the value"),
        ("columns:\n  问题：user\n  b: c", "line 2  问题：user   is not YAML"),
        ("columns: {a: user b: assistant}", "write a comma between the two items"),
        ("lr: 1\n- model: m", "write the settings without the leading -"),
        ("data_path:\n-a.csv\n", "write a space after the -"),
        ("data_path: *.csv", "write quotes around the value"),
        ("a: 1\n---\nlr: 1", "a settings file is one document: remove the line"),
        ("a: 1\nlr： 1\n", "line 2  lr： 1   is not YAML: could not find expected ':'; write : in"),
    ],
    ids=lambda value: None,
)
def test_hints_for_yaml_syntax_errors(tmp_path, text, hint):
    message = problem(tmp_path, text, ".yaml")
    assert hint in message and message.startswith("1 problem in") and "is missing" not in message


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("columns: {问题：user}", "write ': ' instead of the full-width colon"),
        ("betas: （0.9, 0.99）", r"; write [0.9, 0.99]"),
        ("batch_size: ２", "; write 2"),
        ("lr: 1e−4", "; write 1e-4"),
        ("lr: 1e-4;", "; write 1e-4"),
        ("max_length: 2,500", "; write 2500 without commas"),
        ("seed: 010", "a number in base 8; write no leading zeros"),
        ("SYSTEM: !you", "a tag in YAML; write quotes around it"),
        ("validation_ratio: 5%", "write the share as a number: 0.05"),
    ],
    ids=lambda value: None,
)
def test_hints_for_values_in_yaml(tmp_path, line, hint):
    given = "pretrained_model_name_or_path: m\ndata_path: d.jsonl\n"
    assert hint in problem(tmp_path, line, ".yaml", given=given)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("data_path = ['a.csv' 'b.csv']", "two strings without a comma between them"),
        ("data_path = [\n  'a.csv'\n  'b.csv'\n]", "two strings without a comma between them"),
        ("data_path = 'a'\nmax_length = 2,500", "; write 2500 without commas"),
        ("data_path: 'a.csv'", "write data_path = 'a.csv'; a file with  name: value  must end"),
        ("data_path = ['Who are you?' 'Tell me a joke.']", "two strings without a comma"),
        ("data_path = ['你好。'\n '介绍一下你自己。']", "two strings without a comma"),
        ("data_path = ['Tell me a joke' 'Who are you']", "two strings without a comma"),
        ("data_path = ['my data/a.csv' '/my data/b.csv']", "two strings without a comma"),
        ("data_path == 'a.csv'", "write one = to set a value"),
    ],
    ids=lambda value: None,
)
def test_hints_for_lines_that_python_reads(tmp_path, text, hint):
    message = problem(tmp_path, text, ".py", given="pretrained_model_name_or_path = 'm'\n")
    assert hint in message and message.startswith("1 problem in") and "is missing" not in message


def test_long_texts_may_be_joined(tmp_path):
    file = tmp_path / "s.py"
    file.write_text(
        "pretrained_model_name_or_path = 'm'\n"
        "SYSTEM = ('one'\n 'two')\n"
        "data_path = ['a, b', f'{SYSTEM}', 'c' + 'd', 'é ' \"it's\"]\n"
        f"evaluation_inputs = ['Tell me '\n 'more', '{'a' * 80}'\n 'b']\n"
    )
    settings = load_settings(file).settings
    assert settings.SYSTEM == "onetwo"
    assert settings.data_path == ("a, b", "onetwo", "cd", "é it's")
    assert settings.evaluation_inputs == ("Tell me more", "a" * 80 + "b")


@pytest.mark.parametrize(
    "text",
    [
        "['请介绍一下你自己，'\n '并说明你会什么。']",
        "['请用一句话介绍'\n '你自己。']",
        "['Tell me a joke'\n ' about cats.']",
        "['Tell me a joke,\\n'\n 'then explain it.']",
        "['What is the capital of: '\n 'France?']",
    ],
)
def test_a_text_in_two_lines_is_one_item(text, tmp_path):
    file = tmp_path / "s.py"
    needed = "pretrained_model_name_or_path = 'm'\ndata_path = 'd'\n"
    file.write_text(f"{needed}evaluation_inputs = {text}\n", encoding="utf-8")
    assert load_settings(file).settings.evaluation_inputs == tuple(ast.literal_eval(text))


def test_an_exponent_is_written_in_digits(tmp_path):
    assert "in digits" not in problem(tmp_path, "lr = 1e-4 2", ".py")


def test_a_share_is_offered_only_to_a_setting_that_takes_one(tmp_path):
    given = "pretrained_model_name_or_path = 'm'\ndata_path = 'd'\n"
    for line in ("save_steps = '10%'", "max_length = '50%'", "save_steps = '500%'"):
        assert "write the share" not in problem(tmp_path, line, ".py", given=given)
    told = "write the share as a number: 0.05"
    assert told in problem(tmp_path, "warmup_ratio = '5%'", ".py", given=given)


def test_chinese_quotes_in_yaml_are_reported(tmp_path):
    text = "pretrained_model_name_or_path: m\ndata_path: “a.csv”\n"
    assert "is in Chinese quotes, which would be part of the value" in problem(
        tmp_path, text, ".yaml"
    )


def test_an_escape_in_a_path_is_named(tmp_path):
    text = "pretrained_model_name_or_path = 'm'\ndata_path = 'C:\\new.csv'\n"
    assert "write the path with / instead of each backslash" in problem(tmp_path, text, ".py")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"pretrained_model_name_or_path": "m", "data_path": "a.csv"}', "without braces"),
        ('c = dict(pretrained_model_name_or_path="m", data_path="a.csv")', "instead of the call"),
        ('class C:\n    pretrained_model_name_or_path = "m"\n    data_path = "a"', "is read, not"),
        ('a.pretrained_model_name_or_path = "m"\na["data_path"] = "a.csv"', "to one name at a"),
    ],
    ids=["braces", "call", "class", "items"],
)
def test_what_stands_in_a_file_is_not_called_missing(text, words, tmp_path):
    message = problem(tmp_path, text, ".py")
    assert words in message and "is missing" not in message


def test_a_value_without_quotes_is_offered_in_quotes(tmp_path):
    text = "pretrained_model_name_or_path = 'm'\ndata_path = my.jsonl\n"
    assert "its name in quotes: 'my.jsonl'" in problem(tmp_path, text, ".py")
