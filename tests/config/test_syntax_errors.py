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
