"""Tools from files: loaded and run in another process, with time limits; MCP servers."""

import sys
import textwrap

import pytest

from xtuner.calls.read import make_call, name_of
from xtuner.errors import ConfigError
from xtuner.tools.toolbox import open_tools

FILE = '''
import time
from helper_of_tools import TWICE

count = 0


def double(value: int) -> int:
    """Double a number."""
    print("printed, and no answer")
    return value * TWICE


def next_number() -> dict:
    """Count."""
    global count
    count += 1
    return {"number": count}


def slow(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "done"


def broken(value: int) -> float:
    """Fail."""
    return value / 0


def ends() -> None:
    """End the process."""
    import os
    os._exit(1)


async def later() -> str:
    """Answer later."""
    return "later"


def _private(a: int) -> int:
    return a
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "my_tools.py").write_text(FILE)
    (folder / "helper_of_tools.py").write_text("TWICE = 2\n")
    return folder


def test_functions_of_a_file(folder):
    box = open_tools([f"{folder}/my_tools.py", "Calculate=calculator"], timeout=2)
    try:
        assert box.names == ["double", "next_number", "slow", "broken", "ends", "later",
                             "Calculate"]  # fmt: skip
        run = lambda name, **arguments: box.call(make_call(name, arguments))  # noqa: E731
        assert run("double", value=4).text == "8"
        assert [run("next_number").text for _ in range(2)] == ['{"number": 1}', '{"number": 2}']
        assert run("later").text == "later"
        assert run("Calculate", expression="37*49").text == "1813"
        broken = run("broken", value=1)
        assert broken.failed and "ZeroDivisionError: division by zero" in broken.text
        assert "my_tools.py, line 29" in broken.text
        slow = run("slow", seconds=60)
        assert slow.failed and "took more than 2 s" in slow.text
        assert run("next_number").text == '{"number": 1}'  # a new process
        assert run("ends").text == "Error: the tool ended its process"
        assert run("double", value=4).text == "8"
        for call, words in (
            (make_call("duble", {}), "no tool 'duble'; did you mean 'double'"),
            (make_call("double", {"value": "x"}), "value must be an integer"),
            (make_call("double", {}), "value is missing"),
            (make_call("double", "{x"), "must be a JSON object"),
        ):
            result = box.call(call)
            assert result.failed and words in result.text
    finally:
        box.close()
    assert box._providers[0]._process is None


def test_one_function_of_a_file(folder):
    box = open_tools([f"{folder}/my_tools.py:double"])
    assert box.names == ["double"]
    box.close()


def test_wrong_names_are_listed_together(tmp_path):
    with pytest.raises(ConfigError) as caught:
        open_tools(["calculater", "none.py", "read_file", "mcp:", "clock:x", "read_file:/none"])
    for words in ("did you mean 'calculator'", "no file none.py", "read_file:FOLDER",
                  "needs a command", "takes no setting", "no folder /none"):  # fmt: skip
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def f(a): return a", "'a' has no type hint"),
        ("import nothing_of_that_name", r"cannot be imported: ModuleNotFoundError.*line 1"),
        ("x = 1", "defines no public function"),
        ("def calculator(a: int) -> int: return a", "two tools are named 'calculator'"),
    ],
    ids=["hint", "import", "empty", "twice"],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, words):
    (tmp_path / "t.py").write_text(text)
    with pytest.raises(ConfigError, match=words):
        open_tools(["calculator", str(tmp_path / "t.py")])


SERVER = """
    import sys
    from mcp.server import MCPServer

    server = MCPServer("test")

    @server.tool()
    def add(a: int, b: int) -> int:
        '''Add two numbers.'''
        if a < 0:
            raise ValueError("negative")
        return a + b

    server.run()
"""


def test_the_tools_of_an_mcp_server(tmp_path):
    pytest.importorskip("mcp")
    file = tmp_path / "server.py"
    file.write_text(textwrap.dedent(SERVER))
    box = open_tools([f"mcp:{sys.executable} {file}"], timeout=20)
    try:
        (tool,) = box.schemas
        assert name_of(tool) == "add" and tool["function"]["description"] == "Add two numbers."
        assert box.call(make_call("add", {"a": 2, "b": 3})).text == "5"
        assert box.call(make_call("add", {"a": -2, "b": 3})).failed
        assert box.call(make_call("add", {"a": "x", "b": 3})).failed
    finally:
        box.close()
    with pytest.raises(ConfigError, match="the server does not respond"):
        open_tools([f"mcp:{sys.executable} -c pass"], timeout=5)
