"""The built-in tools: results and errors."""

import os
import sys

import pytest

from xtuner.tools.builtin.calculator import calculator
from xtuner.tools.builtin.clock import clock
from xtuner.tools.builtin.read_file import limited_to
from xtuner.tools.builtin.solve import solve
from xtuner.tools.function import schema_of
from xtuner.tools.sandbox import run_code
from xtuner.tools.toolbox import builtin_names

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37 * 49", "1813"), ("(3 + 4) * 2", "14"), ("2^10", "1024"), ("7 / 2", "3.5"),
        ("6 / 2", "3"), ("-3 ** 2", "-9"), ("sqrt(16) + max(1, 2)", "6"), ("5 × 6 ÷ 3", "10"),
        ("17 % 5", "2"), ("factorial(5)", "120"), ("2 * pi", "6.283185307179586"),
    ],
    ids=range(11),
)  # fmt: skip
def test_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9", "__import__('os')", "'a' * 3", "x + 1", "1 if 1 else 2", "[1][0]", "(1).real",
     "factorial(10**9)", "abs(x=1)", "1 +", "", "True + 1", "(" * 300 + "1" + ")" * 300],
    ids=range(13),
)  # fmt: skip
def test_calculator_rejects_other_expressions(expression):
    with pytest.raises((ValueError, OverflowError)):
        calculator(expression)


def test_clock():
    assert "UTC" in clock("UTC")
    assert clock()
    with pytest.raises(ValueError, match="unknown time zone 'Nowhere/X'"):
        clock("Nowhere/X")


def test_solve():
    assert solve("x + 3 = 5") == "x = 2"
    assert solve("2x + y = 5, x - y = 1") == "x = 2, y = 1"
    assert solve("x^2 = 4") == "x = -2; x = 2"
    assert solve("x = x + 1") == "no solution"
    for bad in ("__import__('os')", "x.__class__", "open(x)", "x = 1 = 2", "(1).real", "a.b = 1"):
        with pytest.raises(ValueError):
            solve(bad)


def test_read_file_stays_in_its_folder(tmp_path):
    shared = tmp_path / "shared"
    (shared / "sub").mkdir(parents=True)
    (shared / "a.txt").write_text("hello 你好")
    (shared / "b.bin").write_bytes(b"\0\1")
    (shared / "big.txt").write_text("x" * 200_000)
    (tmp_path / "secret.txt").write_text("secret")
    (shared / "link.txt").symlink_to(tmp_path / "secret.txt")
    (shared / "folder").symlink_to(tmp_path)
    (shared / "inner").symlink_to(shared / "a.txt")
    read = limited_to(str(shared))
    assert read("a.txt") == read("./sub/../a.txt") == read("inner") == "hello 你好"
    assert read(".").splitlines() == ["a.txt", "b.bin", "big.txt", "folder/", "inner", "link.txt",
                                      "sub/"]  # fmt: skip
    assert read("sub") == "(empty)"
    assert read("big.txt").endswith("(cut after 100,000 bytes)")
    for path in ("../secret.txt", "/etc/passwd", "link.txt", "folder/secret.txt", "sub/../../x"):
        with pytest.raises(PermissionError, match="outside the shared folder"):
            read(path)
    with pytest.raises(ValueError, match="not a text file"):
        read("b.bin")
    with pytest.raises(FileNotFoundError):
        read("none.txt")


def test_every_builtin_tool_has_a_described_schema():
    for name in builtin_names():
        module = __import__(f"xtuner.tools.builtin.{name}", fromlist=["x"])
        function = module.TOOL if hasattr(module, "TOOL") else module.limited_to("/")
        inner = schema_of(function)["function"]
        assert inner["name"] == name and inner["description"]
        assert all(p["description"] for p in inner["parameters"]["properties"].values())


@LINUX
def test_code_gives_output_and_the_last_value():
    assert run_code("print('a')\nx = 20\nx + 1") == "a\n21"
    assert run_code("import math, json\nmath.comb(5, 2)") == "10"
    assert run_code("x = 1") == "(no output)"
    assert run_code("print('é🙂')") == "é🙂"
    assert "ZeroDivisionError: division by zero" in run_code("1/0")
    assert "SyntaxError" in run_code("def f(:")
    assert run_code("open('x', 'w').write('ab'); open('x').read()") == "'ab'"


@LINUX
def test_code_has_no_network_processes_or_files(tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("4711")
    monkeypatch.setenv("SECRET", "4711")
    attempts = [
        "import socket; socket.socket()",
        "import urllib.request as u; u.urlopen('http://127.0.0.1:9')",
        "import socket; socket.socketpair()",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import os; os.fork()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.kill(os.getppid(), 15)",
        f"open({str(secret)!r}).read()",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        "open('/etc/passwd').read()",
        f"import os; os.symlink({str(secret)!r}, 'l'); open('l').read()",
    ]
    for code in attempts:
        shown = run_code(code)
        assert "Error" in shown and "4711" not in shown, code
    assert "4711" not in run_code("import os; dict(os.environ)")
    raw = "import ctypes; print(ctypes.CDLL(None).syscall(41 if 'x86' in "
    assert run_code(raw + "__import__('platform').machine() else 198, 2, 1, 0))") == "-1"
    assert not (tmp_path / "new").exists()


@LINUX
def test_code_is_limited_in_time_memory_and_output():
    with pytest.raises(RuntimeError, match="took more than"):
        run_code("while True: pass", seconds=1)
    with pytest.raises(RuntimeError, match="took more than 1 s"):
        run_code("import time; time.sleep(60)", seconds=0.5)
    assert "MemoryError" in run_code("'a' * 10**10")
    assert len(run_code("while True: print('x' * 1000)", seconds=2)) < 10_100
    before = {*os.listdir("/tmp")} if os.path.isdir("/tmp") else set()
    run_code("open('left', 'w')")
    after = {*os.listdir("/tmp")} if os.path.isdir("/tmp") else set()
    assert not [name for name in after - before if name.startswith("xtuner-python-")]
