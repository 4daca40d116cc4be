"""Commands that are printed for the user to copy work with any path."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import xtuner
from xtuner import cli
from xtuner.errors import shell_command
from xtuner.hub.sharing import shareable_command

NAMES = [
    "plain",
    "two words",
    "it's",
    'a "b"',
    "$HOME",
    "`x`",
    "中文 目录",
    "a;b&c|d",
    "~",
    "*",
    "",
]
_COMMANDS = "|".join(
    file.stem.replace("_", "[-_]") for file in Path(cli.__file__).parent.glob("[!_]*.py")
)
_OPEN_COMMAND = re.compile(
    rf"(?<!\w)(xtuner ({_COMMANDS})|hf upload|pip install|python -m|--resume)\b[^`:;,(]* $"
)
"""The text before a placeholder that is a word of a command."""


def test_words_of_a_command_reach_the_program_unchanged():
    line = shell_command("printf", "%s\\n", *NAMES)
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:-1] == NAMES
    assert shlex.split(shell_command("xtuner", "chat", Path("my run"))) == [
        "xtuner", "chat", "my run",
    ]  # fmt: skip
    assert shell_command("xtuner", "chat", "MODEL", "--adapter", "iter_5") == (
        "xtuner chat MODEL --adapter iter_5"
    )


def test_the_home_directory_of_a_shared_command_is_expanded_by_a_shell():
    home = Path.home()
    words = [home / "my runs" / "w", home / "w", home, "~/my runs", f"/gpfs{home}/w", *NAMES]
    line = shareable_command("printf", "%s\\n", *words)
    assert line.startswith("printf '%s\\n' ~/'my runs/w' ~/w ~ '~/my runs' ")
    found = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[:-1] == list(map(str, words))


def unquoted(source):
    """The placeholders of f-strings in `source` that are words of a command."""
    for text in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)):
        before = ""
        for part in text.values:
            if isinstance(part, ast.Constant):
                before += part.value
                continue
            value = ast.unparse(part.value)
            if _OPEN_COMMAND.search(before) and not value.startswith("shell_command("):
                yield value
            before += "VALUE"


def test_no_command_contains_an_unquoted_value():
    assert list(unquoted("f'`xtuner train {path}` trains'; f'add --resume {path}'")) == ["path"] * 2
    found = [
        f"{file.relative_to(package)}: {value}"
        for package in [Path(xtuner.__file__).parent]
        for file in package.rglob("*.py")
        for value in unquoted(file.read_text(encoding="utf-8"))
    ]
    assert found == []
