"""Lines of a run: wrapped in a terminal, unwrapped elsewhere; slow work is reported."""

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from xtuner import cli
from xtuner.engine.counting import Counter
from xtuner.engine.hooks import evaluation
from xtuner.engine.working import say, working
from xtuner.wrapping import XTUNER_COMMANDS, columns, wrapped


def console(*, terminal, width=50):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)


PATH = "/a/very/long/path/that/stays/whole/as/it/is/without/a/break"
LINE = f"Note         the quick brown fox jumps over the lazy dog {PATH}"


def test_a_terminal_wraps_at_words_below_the_text():
    shown = console(terminal=True)
    say(shown, LINE)
    lines = shown.file.getvalue().splitlines()
    assert lines[0] == "Note         the quick brown fox jumps over the"
    assert lines[1] == " " * 13 + "lazy dog"
    assert lines[2] == " " * 13 + PATH


def test_lines_in_a_file_are_not_wrapped():
    shown = console(terminal=False)
    say(shown, LINE)
    assert shown.file.getvalue() == LINE + "\n"


def test_slow_work_is_reported_next_to_a_progress_bar():
    shown = console(terminal=False)
    with working(shown, "Loading"):
        assert shown.file.getvalue() == "Loading...\n"
    moving = console(terminal=True)
    with working(moving, "Asking"):
        pass
    assert "Asking..." in moving.file.getvalue()
    with moving.status("bar"), working(moving, "Asking"):
        pass  # some releases of rich reject a second spinner


def test_quiet_process_prints_nothing():
    quiet = Console(file=io.StringIO(), quiet=True)
    with working(quiet, "Loading"):
        say(quiet, LINE)
    assert quiet.file.getvalue() == ""


def test_chinese_takes_two_columns_and_breaks_between_characters():
    shown = console(terminal=True)
    say(shown, "Note         " + "美丽的城市，" * 5 + "'问题的回答问题的回答'")
    assert shown.file.getvalue().splitlines() == [
        "Note         " + "美丽的城市，" * 3,
        " " * 13 + "美丽的城市，" * 2,
        " " * 13 + "'问题的回答问题的回答'",
    ]
    assert columns("a问é") == 4


def test_an_answer_that_is_wider_than_the_terminal_stays_apart_from_its_mark(tmp_path):
    shown = console(terminal=True)
    run = SimpleNamespace(
        settings=SimpleNamespace(evaluation_inputs=[PATH], evaluation_images=()),
        console=shown, counter=Counter(), step=0, validate=None, is_main=True,
        answers=lambda questions: ["I know"], log_dir=tmp_path,
    )  # fmt: skip
    evaluation.Hook().on_start(run)
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown.file.getvalue())
    assert f"  Q\n    {PATH}\n  A I know\n" in text


def test_commands_and_the_lines_of_a_narrow_terminal_are_kept_whole():
    command = "  xtuner train my.py --work-dir somewhere --set max_steps=4 --resume"
    assert wrapped(command, 50) == command
    assert wrapped(LINE, 20) == LINE
    assert wrapped("  one two three four five six seven eight nine", 40).splitlines()[1] == (
        "      eight nine"
    )


@pytest.mark.parametrize(
    "whole",
    [
        "`xtuner train config.py --resume auto --work-dir somewhere`",
        "'/home/ada/my data/first rows of all.jsonl'",
        "(pip install 'xtuner[gpu]' --upgrade --no-cache-dir)",
        "xtuner chat Qwen/Qwen2.5 --adapter 'my runs/b' --greedy",
    ],
    ids=["backticks", "path", "brackets", "command"],
)
def test_what_is_copied_stays_in_one_line(whole):
    for before in (
        "b is an adapter on a model that is not here; use it so: ",
        "请先用另一个模型：",
    ):
        text = f"{before}{whole}"
        lines = wrapped(text, 60).splitlines()
        assert lines[-1].strip().endswith(whole) and len(lines) > 1
        assert max(map(columns, lines[:-1])) <= 60
    after = "" if whole.startswith("xtuner") else "，然后再试一次" * 6
    assert whole in wrapped(f"请运行：{whole}{after}", 60)


def test_prose_that_begins_like_a_command_is_wrapped():
    for start in ("make sure that", "xtuner reads", "pip is"):
        text = f"{start} " + "many words " * 10
        assert max(map(len, wrapped(text, 50).splitlines())) <= 50


def test_a_long_chinese_text_with_a_path_is_wrapped_after_its_punctuation():
    text = "请检查文件/data/行.jsonl，" + "其中的每一行都应当是一个对象，" * 4
    lines = wrapped(text, 50, indent=0).splitlines()
    assert max(map(columns, lines)) <= 50 and "".join(lines) == text
    assert "/data/行.jsonl" in lines[0]


def test_every_command_of_xtuner_is_known_to_the_wrapping():
    files = {file.stem for file in Path(cli.__file__).parent.glob("[!_]*.py")} - {"app"}
    assert {name.replace("_", "-") for name in files} == {*XTUNER_COMMANDS}


def test_an_apostrophe_begins_no_quotation():
    text = "I'm here to help you share what you've learned. Whether it's a journey, I'm here."
    lines = wrapped(text, 50, indent=0).splitlines()
    assert max(map(len, lines)) <= 50 and " ".join(lines) == text and len(lines) == 2
