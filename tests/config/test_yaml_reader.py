"""The reader of YAML settings files."""

import pytest

from xtuner.config.read import yaml
from xtuner.config.read.entries import report


def test_reads_values_and_lines():
    reading = yaml.read(
        "# comment\nlr: 1e-4\nmax_steps: None\nbetas: [0.9, 0.999]\ndata_path:\n  - a\n  - b\n"
    )
    assert not reading.problems
    assert {name: (e.value, e.line) for name, e in reading.entries.items()} == {
        "lr": (1e-4, 2),
        "max_steps": (None, 3),
        "betas": ([0.9, 0.999], 4),
        "data_path": (["a", "b"], 5),
    }


@pytest.mark.parametrize("number", ["1e-4", "1E+3", "-2e5", "2.e-4", "3.5e2"])
def test_exponents_are_numbers(number):
    assert yaml.read(f"lr: {number}").entries["lr"].value == float(number)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lr: 1\nseed: 2\nlr: 3", 3, "already set in line 1"),
        ("lr: 1\n  seed: 2", 2, "not YAML"),
        ("lr: &a 1\nseed: *a", 2, "aliases"),
        ("lr: !!python/object/apply:os.system ['true']", 1, "cannot be read"),
        ("- a\n- b", 0, "key: value"),
        ("x: " + "[" * 3000, 0, "nested too deeply"),
    ],
)
def test_faults_have_their_line(text, line, message):
    (problem,) = yaml.read(text).problems
    assert problem.line == line
    assert message in problem.message


def test_an_empty_file_sets_nothing():
    assert yaml.read("# nothing\n").entries == {}


@pytest.mark.parametrize(
    "value",
    ['!!int ""', '!!float ""', '!!int "-"', "!!bool maybe", "!!timestamp abc", '"\\U00110000"',
     "1" + ":1" * 100_000, "9" * 100_000],
    ids=["int", "float", "sign", "bool", "timestamp", "escape", "sexagesimal", "digits"],
)  # fmt: skip
def test_unparsable_yaml_values_are_problems(value):
    reading = yaml.read(f"max_length: 512\nlr: {value}\n")
    assert len(reading.problems) == 1
    assert "lr" not in reading.entries


@pytest.mark.parametrize("value", ["1:30", "59:59.5"])
def test_numbers_in_base_60_are_no_settings(value):
    (problem,) = yaml.read(f"lr: {value}").problems
    assert f"YAML takes '{value}' for a number in base 60" in problem.message
    assert yaml.read(f"SYSTEM: '{value}'").entries["SYSTEM"].value == value


def test_the_report_of_many_problems_is_bounded():
    reading = yaml.read("lr: 1\n" * 5_000)
    said = report("a.yaml", reading.problems).splitlines()
    assert len(said) < 210 and "4,999 problems in a.yaml" in said[0]
    assert "... and 4,799 more" in said[-1]
