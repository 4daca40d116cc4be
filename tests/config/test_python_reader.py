"""The reader of Python settings files: what it supports, rejects and survives."""

import re

import pytest
from counting import lines_run, most_memory

from xtuner.config.load import load_settings
from xtuner.config.read import python
from xtuner.errors import ConfigError


def values(text, **overrides):
    reading = python.read(text, overrides=overrides)
    assert not reading.problems, reading.problems
    return {name: entry.value for name, entry in reading.entries.items()}


def only_problem(text):
    reading = python.read(text)
    assert len(reading.problems) == 1, reading.problems
    return reading.problems[0]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("2e-4", 2e-4),
        ("-3", -3),
        ("(0.9, 0.999)", (0.9, 0.999)),
        ("['a', 'b']", ["a", "b"]),
        ("2 * 3 + 4 // 3 - 2 ** 3 % 5 / 2", 2 * 3 + 4 // 3 - 2**3 % 5 / 2),
        ("'a' 'b' + 'c'", "abc"),
        ("'-' * 3", "---"),
        ("[1] * 2 + [3]", [1, 1, 3]),
        ("f'{1 + 1:03d}-{\"x\"!r:>5}'", "002-  'x'"),
        ("', '.join(['a', 'b'])", "a, b"),
        ("1 if 2 > 1 >= 1 else 0", 1),
        ("not (1 in [2] or None is None) and True", False),
        ("{'a': [1, 2]}['a'][-1]", 2),
        ("'abcdef'[1:-1]", "bcde"),
        ("None or 'x'", "x"),
    ],
)
def test_expressions_mean_what_python_means(expression, expected):
    assert values(f"x = {expression}") == {"x": expected}


def test_reads_statements_with_lines_and_hides_helpers():
    text = '''"""A docstring."""
_base = 512  # a helper
lr: float = 2e-4
if _base > 100:
    max_length = _base * 2
elif undefined_name:
    max_length = 3
else:
    pass
a = b = 1
'''
    reading = python.read(text)
    assert not reading.problems
    assert {name: (e.value, e.line) for name, e in reading.entries.items()} == {
        "lr": (2e-4, 3),
        "max_length": (1024, 5),
        "a": (1, 10),
        "b": (1, 10),
    }


def test_an_override_is_in_place_before_anything_is_computed_from_it():
    text = "batch_size = 4\naccumulative_counts = 32 // batch_size"
    assert values(text, batch_size=2) == {"batch_size": 2, "accumulative_counts": 16}


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("import json", "my_file.py:function"),
        ("from torch.optim import AdamW", "my_file.py:function"),
        ("def f(): pass", "my_file.py:function"),
        ("x = lambda: 1", "my_file.py:function"),
        ("x = open('secret')", "read, not executed"),
        ("x = __import__('os').system('true')", "read, not executed"),
        ("x = (1).__class__", "read, not executed"),
        ("for i in [1]: pass", "write the values out"),
        ("x = [i for i in [1]]", "write the values out"),
        ("x += 1", "in full"),
        ("a, b = 1, 2", "one name at a time"),
        ("x = true", "write True"),
        ("x = AdamW", "strings need quotes"),
        ("x = 1 / 0", "divides by zero"),
        ("x = 'a' + 1", "cannot combine a string and a number"),
        ("x = 'a' * 'b'", "cannot combine"),
        ("x = [1][3]", "no item 3"),
        ("x = -'a'", "a string"),
        ("x = (-8) ** 0.5", "not a real number"),
        ("x = b'1'", "cannot be bytes"),
        ("x = {1, 2}", "write a list"),
        ("lr", "write name = value"),
        ("x = = 1", "is not Python"),
    ],
)
def test_anything_else_is_a_problem_with_its_line_and_a_hint(statement, hint):
    problem = only_problem(f"\n\n{statement}\n")
    assert problem.line == 3
    assert hint in problem.message
    assert problem.what == statement


def test_reports_every_fault_once():
    text = "_n = open('x')\nlr = _n\nmax_length = _n + 1\nseed = missing"
    reading = python.read(text)
    assert [p.line for p in reading.problems] == [1, 4]
    assert {"lr", "max_length", "seed"} <= reading.broken
    assert not reading.entries


def test_a_misspelt_name_is_recognised():
    assert "did you mean '_length'" in only_problem("_length = 3\nx = _lenght").message


@pytest.mark.parametrize(
    "text",
    [
        "x = 10**10**9",
        "x = 9 ** 99999999",
        "x = 'a' * 10**10",
        "x = [0] * 10**9",
        "x = 10**8 * ['a']",
        "a = [0] * 900\nb = [a] * 900\nc = [b] * 900",
        "x = f'{1:999999999}'",
        'x = f\'{"a":{"9" * 9}}\'',
        "x = '%99999999d' % 1",
        "x = " + "(" * 5000,
        "x = " + "not " * 5000 + "1",
        "x = " + "1 + " * 20000 + "1",
        "x = " + "9" * 5000,
        "x = '\0'",
        "\n".join(f"x{i} = 'a' * 99000" for i in range(2000)),
    ],
    ids=lambda text: text[:24].replace("\0", "NUL").replace("\n", " "),
)
def test_hostile_file_is_rejected_cheaply(text):
    assert python.read(text).problems
    assert lines_run(python.read, text, limit=2_000_000)
    assert most_memory(python.read, text) < 16 * 2**20


@pytest.mark.parametrize(
    "text",
    ["f'{1:000000000009000000000}'", "f'{1.5:.0000000002000000000f}'",
     "f\"{'a':<000000000002000000000}\"", "'a' * 10**9", "[0] * 10**9", "10 ** 10 ** 9"],
    ids=["width", "precision", "fill", "text", "list", "power"],
)  # fmt: skip
def test_a_value_of_gigabytes_is_refused_before_it_is_made(text):
    reading = python.read(f"x = {text}\nlr = f'{{2:07.3f}}'")
    assert [problem.message for problem in reading.problems] == ["is too large for a setting"]
    assert reading.entries["lr"].value == "002.000"


def test_many_unknown_names_are_counted(tmp_path):
    file = tmp_path / "c.py"
    names = "".join(f"name_{number} = {number}\n" for number in range(20_000))
    file.write_text(f"{names}{'x' * 5000} = 1\n")
    with pytest.raises(ConfigError, match=r"19,9\d\d more names are not settings"):
        load_settings(file)


def test_file_with_only_faults_is_not_read_completely():
    reading = python.read("x = y\n" * 20_000)
    assert len(reading.problems) == 200


def test_a_few_calls_are_computed():
    reading = python.read(
        "import os\nimport os.path as osp\nfrom os.path import join\n"
        "max_length = int(2048 - (336 / 14) ** 2)\nlr = float('1e-4')\nsave_steps = round(2.6)\n"
        "seed = len([1, 2])\nSYSTEM = str(3)\ndata_root = os.path.join('a', 'b')\n"
        "image_folder = osp.join('a', '/b')\nwork_dir = join('a', 'c')\n"
    )
    assert not reading.problems
    values = {name: entry.value for name, entry in reading.entries.items()}
    assert values == {
        "max_length": 1472, "lr": 1e-4, "save_steps": 3, "seed": 2, "SYSTEM": "3",
        "data_root": "a/b", "image_folder": "/b", "work_dir": "a/c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "hint"),
    [
        ("x = int('many')", "int cannot take a string"),
        ("x = int(float('inf'))", "int cannot take a number"),
        ("x = int('9' * 4000)", "int cannot take|too large"),
        ("x = str([1])", "str takes a number"),
        ("x = len(open('x'))", "write the value instead of the call"),
        ("x = int(x=1)", "write the value instead of the call"),
        ("x = os.system('ls')", "write the value instead of the call"),
        ("import os, sys", "my_file.py:function"),
        ("from os import system", "my_file.py:function"),
    ],
)
def test_other_calls_and_imports_stay_refused(statement, hint):
    assert re.search(hint, only_problem(statement).message)
