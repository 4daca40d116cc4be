"""A syntax error is the only problem reported, with hints for common ones."""

import pytest

from xtuner.config.load import load_settings
from xtuner.errors import ConfigError


def problem(tmp_path, text, suffix):
    file = tmp_path / f"settings{suffix}"
    file.write_text(text, encoding="utf-8")
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
        ("a: 1\nlr： 1\n", "line 2  lr： 1   is not YAML: could not find expected ':'; write : in"),
    ],
    ids=lambda value: None,
)
def test_hints_for_yaml_syntax_errors(tmp_path, text, hint):
    message = problem(tmp_path, text, ".yaml")
    assert hint in message and message.startswith("1 problem in") and "is missing" not in message


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
