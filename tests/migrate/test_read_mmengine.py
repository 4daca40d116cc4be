"""Configs of mmengine are read, not executed: values, bases, bounds, and unread values."""

import time

import pytest

from xtuner.errors import ConfigError
from xtuner.migrate.values import Dotted, Unread, UnreadError, unused
from xtuner.migrate.xtuner.read import read


@pytest.fixture
def read_text(tmp_path):
    def read_text(text, name="config.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return read(path)

    return read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x = int(2048 - (336 / 14)**2)", 1472),
        ("x = round(2.6) + len([1, 2]) + max(1, 2)", 7),
        ("import os\nx = os.path.join('a', 'b/', 'c.json')", "a/b/c.json"),
        ("import os.path as osp\nx = osp.join('a', 'b')", "a/b"),
        ("a = 'data'\nx = f'{a}/rows_{3}.json'", "data/rows_3.json"),
        ("x = dict(a=1, **dict(b=[2, (3,)]))", {"a": 1, "b": [2, (3,)]}),
        ("x = {'a': 1}\nx.update(dict(b=2))\nx.a = 5", {"a": 5, "b": 2}),
        ("x = dict(m=dict(r=1, s=2))\nx.merge(dict(m=dict(r=3)))", {"m": {"r": 3, "s": 2}}),
        ("x = [1]\nx += [2]\nx.append(3)", [1, 2, 3]),
        ("n = 4\nx = 'many' if n > 1 else 'one'", "many"),
        ("flag = False\nx = 1\nif flag:\n    x = 2", 1),
        ("a, x = 1, 2", 2),
        ("import torch\nx = torch.float16", Dotted("torch.float16")),
        ("from a.b import c as d\nx = d.e", Dotted("a.b.c.e")),
    ],
    ids=range(14),
)
def test_values(read_text, text, value):
    assert read_text(text)["x"] == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import os\nx = os.getenv('HOME')", "is a call"),
        ("def f():\n    return 1\nx = f()", "is a call"),
        ("x = [i for i in range(3)]", "list comprehension"),
        ("x = 1\nfor i in (1, 2):\n    x = i", "loop"),
        ("x = __import__('os').system('touch hacked')", "is a call"),
        ("x = 'a' * 10**9", "too large"),
        ("x = 10**10**9", "too large"),
        ("x = f'{1:0000000009000000000}'", "format spec"),
        ("x = missing", "is not defined"),
        ("x = [1, 2]\nx[0] = 5\nx.sort()", "only after executing"),
    ],
    ids=range(10),
)
def test_values_that_need_execution_are_unread(read_text, tmp_path, monkeypatch, text, why):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    config = read_text(text)
    assert time.perf_counter() - start < 5
    assert isinstance(config["x"], Unread)
    assert why in config["x"].why
    assert not (tmp_path / "hacked").exists()
    with pytest.raises(UnreadError):
        config.take("x")


def test_unread_value_affects_only_its_key(read_text):
    config = read_text("import os\nx = dict(a=os.cpu_count(), b=2)")
    assert config["x"].take("b") == 2
    with pytest.raises(UnreadError) as caught:
        config["x"].take("a")
    assert caught.value.value.line == 2


@pytest.mark.parametrize(
    "lines",
    [
        [f"x{i} = 'a' * 49000" for i in range(2000)],
        ["a = ['x'] * 20000", *(f"x{i} = [a, a, a]" for i in range(5000))],
        ["a = dict(b=1)", *(f"a = dict(c=a, d=a, e={i})" for i in range(5000))],
    ],
    ids=["long", "refused", "nested"],
)
def test_expensive_settings_file_is_rejected_quickly(read_text, lines):
    text = "\n".join(lines)
    with pytest.raises(ConfigError, match="computes too much"):
        read_text(text)


def test_bases_are_read_in_the_same_way(read_text):
    read_text("model = dict(llm=dict(path='a'), lora=dict(r=64))\nlr = 1e-4", "base/one.py")
    read_text("from mmengine.config import read_base\nwith read_base():\n    from .one import *\n"
              "model['lora']['r'] = 8", "base/two.py")  # fmt: skip
    config = read_text(
        "from mmengine.config import read_base\nwith read_base():\n    from .base.two import *\n"
        "model.update(dict(llm=dict(path='b')))"
    )
    assert config["model"] == {"llm": {"path": "b"}, "lora": {"r": 8}}
    assert config["lr"] == 1e-4


def test_a_text_base_lies_below(read_text):
    read_text("model = dict(a=1, b=dict(c=2, d=3), e=dict(f=1))", "base.py")
    config = read_text(
        "_base_ = './base.py'\nmodel = dict(b=dict(c=5), e=dict(_delete_=True, g=2))"
    )
    assert config["model"] == {"a": 1, "b": {"c": 5, "d": 3}, "e": {"g": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "with read_base():\n    from .missing import *",
        "_base_ = 'missing.py'",
        "_base_ = 'mmdet::configs/x.py'",
        "_base_ = './config.py'",
    ],
    ids=["module", "file", "package", "itself"],
)
def test_a_missing_base_is_named(read_text, text):
    with pytest.raises(ConfigError, match=r"config\.py"):
        read_text(text)


def test_unused_keys_are_listed_with_their_lines(read_text):
    config = read_text("x = dict(\n    a=1,\n    b=dict(\n        c=2,\n        d=3))")
    config.take("x").take("a")
    config["x"].take("b").take("c")
    assert list(unused(config["x"], "x")) == [(5, "x.b.d", 3)]
