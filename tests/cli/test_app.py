"""The command line: exit codes, messages, and imports before it responds."""

import os
import subprocess
import sys

import pytest
import typer.main

from xtuner import __version__, plugins
from xtuner.cli import app
from xtuner.errors import ConfigError, DataError

COMMAND = [sys.executable, "-m", "xtuner.cli.app"]


@pytest.fixture
def failing(monkeypatch):
    """Make `xtuner list-cfg` raise an error of the test's choice."""
    from xtuner.config.builtin import catalog

    def failing(error):
        def names(pattern):
            raise error

        monkeypatch.setattr(catalog, "names", names)

    return failing


def test_every_file_of_the_folder_is_a_command_with_help(capsys):
    assert app.main(["--help"]) == 0
    overview = capsys.readouterr().out
    for file in plugins.names("xtuner.cli"):
        if file != "app":
            name = file.replace("_", "-")
            assert f"  {name} " in overview
            assert app.main([name, "--help"]) == 0


def test_without_arguments_it_shows_the_help(capsys):
    assert app.main([]) == 0
    assert "list-cfg" in capsys.readouterr().out


def test_version(capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out == f"xtuner {__version__}\n"


def test_an_unknown_command_is_answered_with_a_close_one(capsys):
    assert app.main(["list-cgf"]) == 2
    assert "list-cfg" in capsys.readouterr().err


def test_user_error_is_a_message_with_exit_code_2(failing, capsys):
    failing(DataError("a.jsonl line 3: no 'messages'"))
    assert app.main(["list-cfg"]) == 2
    assert capsys.readouterr().err == "DataError: a.jsonl line 3: no 'messages'\n"


@pytest.mark.parametrize("arguments", [["--debug", "list-cfg"], ["list-cfg", "--debug"]])
def test_debug_shows_the_traceback(failing, arguments):
    failing(DataError("x"))
    with pytest.raises(DataError):
        app.main(arguments)


def test_debug_by_environment(failing, monkeypatch):
    failing(DataError("x"))
    monkeypatch.setenv("XTUNER_DEBUG", "1")
    with pytest.raises(DataError):
        app.main(["list-cfg"])


def test_internal_error_shows_its_traceback(failing):
    failing(ZeroDivisionError("x"))
    with pytest.raises(ZeroDivisionError):
        app.main(["list-cfg"])


def test_errors_wrap_in_a_terminal_and_nowhere_else(failing, capsys, monkeypatch):
    failing(ConfigError("word " * 20 + "end"))
    assert app.main(["list-cfg"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert app.main(["list-cfg"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 50 and lines[1].startswith("    word ")


def test_user_code_that_exits_is_named(tmp_path, failing, capsys):
    (tmp_path / "mine.py").write_text("def act():\n    raise SystemExit(3)\n")
    act = plugins.load_user_object(str(tmp_path / "mine.py:act"), setting="s")
    try:
        act()
    except SystemExit as error:
        failing(error)
    assert app.main(["list-cfg"]) == 2
    assert "Your code raised SystemExit: 3 (" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--debug"]])
def test_error_in_user_code_is_reported_with_its_line(tmp_path, failing, arguments, capsys):
    (tmp_path / "mine.py").write_text("def act(row):\n    x = 1\n    return row['none']\n")
    act = plugins.load_user_object(str(tmp_path / "mine.py:act"), setting="s")
    try:
        act({})
    except KeyError as error:
        failing(error)
    if arguments:
        with pytest.raises(KeyError):
            app.main(["list-cfg", *arguments])
        return
    assert app.main(["list-cfg"]) == 2
    told = capsys.readouterr().err
    assert f"Your code raised KeyError: 'none' ({tmp_path / 'mine.py'} line 3, in act)" in told


def test_import_error_in_a_user_file_is_reported_with_its_line(tmp_path):
    for text, words in [("x = 1\ny = 1 / 0\n", "line 2, in <module>"), ("def f(:\n", "line 1")]:
        (tmp_path / "own.py").write_text(text)
        with pytest.raises(ConfigError, match=words):
            plugins.load_user_object(str(tmp_path / "own.py:f"), setting="s")


def test_python_m_xtuner_is_the_command_and_completes():
    environment = {**os.environ, "_XTUNER_COMPLETE": "complete_bash", "COMP_WORDS": "xtuner tra",
                   "COMP_CWORD": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "xtuner"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["train"]


def test_names_of_built_in_settings_and_of_settings_are_completed():
    def completed(command, word):
        parameters = typer.main.get_command(app.build_app()).commands[command].params
        found = parameters[0].shell_complete(None, word)
        return [item.value for item in found]

    assert "qwen3_0_6b_lora_custom" in completed("copy-cfg", "qwen3_0_6b_lora_c")
    assert completed("train", "qwen3_0_6b_lora_cus") and not completed("train", "")
    assert completed("explain", "lora_al") == ["lora_alpha"]


def test_an_interrupt_exits_with_130(failing):
    failing(KeyboardInterrupt())
    assert app.main(["list-cfg"]) == 130


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        (["train", "a.py", "--set", "lr=1"], ["train", "a.py", "--set", "lr=1"]),
        (
            ["train", "a.py", "--cfg-options", "lr=1", "seed=2", "--resume", "iter_3"],
            "train a.py --cfg-options lr=1 --cfg-options seed=2 --resume iter_3".split(),
        ),
        (["train", "--set", "lr=1", "a.py"], ["train", "--set", "lr=1", "a.py"]),
        (["chat", "--ask", "a=1", "b=2"], ["chat", "--ask", "a=1", "b=2"]),
    ],
)
def test_one_flag_may_carry_several_overrides(given, expanded):
    assert app.expand_overrides(given) == expanded


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["train", "a.py", "--resume"], ["train", "a.py", "--resume", "last"]),
        (["train", "--resume", "a.py"], ["train", "--resume", "last", "a.py"]),
        (["train", "a.py", "--resume", "iter_5"], ["train", "a.py", "--resume", "iter_5"]),
    ],
)
def test_resume_alone_means_the_last_checkpoint(given, completed):
    assert app.complete_resume(given) == completed


def test_resume_takes_a_path_to_a_folder_of_any_name(tmp_path):
    (tmp_path / "best").mkdir()
    given = ["train", "a.py", "--resume", str(tmp_path / "best")]
    assert app.complete_resume(given) == given
    assert app.complete_resume(["train", "--resume", "x/c.py"])[2:] == ["last", "x/c.py"]


def test_closed_pipe_is_not_an_error():
    reader = f"{' '.join(COMMAND)} list-cfg | head -n 1"
    done = subprocess.run(reader, shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Error" not in done.stderr
    assert "Exception" not in done.stderr


SETTLED = ("config", "algorithms", "migrate", "plugins", "types", "errors")
"""Folders and modules that answer before torch is there."""


def test_settings_algorithms_and_help_need_neither_torch_nor_transformers():
    """Every module of the lower layers, and the help of every command, in one process."""
    program = f"""
import contextlib, importlib, io, pkgutil, sys
import xtuner
from xtuner import plugins
from xtuner.cli.app import main
imported = []
for name in {SETTLED}:
    module = importlib.import_module(f"xtuner.{{name}}")
    imported.append(module.__name__)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), f"xtuner.{{name}}."):
        imported.append(importlib.import_module(found.name).__name__)
with contextlib.redirect_stdout(io.StringIO()):
    codes = [main([file.replace("_", "-"), "--help"]) for file in plugins.names("xtuner.cli")
             if file != "app"]
print(len(imported), set(codes), [m for m in ("torch", "transformers", "peft") if m in sys.modules])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, rest = done.stdout.split(" ", 1)
    assert rest == "{0} []\n"
    assert int(count) > 40


HEAVY = ("torch", "transformers", "peft", "numpy", "pyarrow", "matplotlib")
"""What takes longer to import than a person likes to wait for an answer."""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["list-cfg"], 0),
        (["copy-cfg", "smollm2_135m_instruct_qlora_alpaca_e3", "."], 0),
        (["copy-cfg", "nonsense", "."], 2),
        (["chat", "nothing"], 2),
        (["train", "wrong.py"], 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_answers_without_importing_what_is_slow_to_import(arguments, code, tmp_path):
    (tmp_path / "wrong.py").write_text("lrr = 3\nprompt_template = 'x'\n")
    show = (
        "import sys; from xtuner.cli.app import main; code = main(sys.argv[1:]); "
        f"print([m for m in {HEAVY} if m in sys.modules]); sys.exit(code)"
    )
    command = [sys.executable, "-c", show, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.returncode == code
