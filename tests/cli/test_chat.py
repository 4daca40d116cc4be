"""The command `xtuner chat` on a tiny model: flags, pipes, and a person at the terminal."""

import io
import itertools
from pathlib import Path

import pytest

from xtuner.chat import opening, terminal
from xtuner.chat.opening import open_chat
from xtuner.cli import app
from xtuner.generation.generate import GenerationOptions

EIGHT = GenerationOptions(max_new_tokens=8)
SHORT = ("--max-new-tokens", "8", "--dtype", "float32")


class FakeSession:
    """Answers with what was asked, in upper case; a question 'slow' is stopped by Ctrl-C."""

    tools = None

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, text: str):
        self.asked.append(text)
        yield text.upper()[:2]
        if text == "slow":
            raise KeyboardInterrupt
        yield text.upper()[2:]

    def reset(self) -> None:
        self.asked.append("(reset)")


def converse(*lines: str | type[BaseException]) -> tuple[list[str], str, str]:
    """Type `lines`; returns the questions, the output and the notes."""
    left = itertools.chain(lines, itertools.repeat(EOFError))

    def read_line(prompt: str) -> str:
        line = next(left)
        if isinstance(line, str):
            return line
        raise line

    session, out, notes = FakeSession(), io.StringIO(), io.StringIO()
    terminal.Terminal(read_line, out, notes, interactive=True).converse(session)
    return session.asked, out.getvalue(), notes.getvalue()


def test_an_empty_line_sends_and_exit_leaves() -> None:
    asked, out, _ = converse("", "one", "two", "", "three", "", "EXIT", "four", "")
    assert asked == ["one\ntwo", "three"] and out == "ONE\nTWO\nTHREE\n"


def test_reset_and_exit_are_commands_only_as_first_lines() -> None:
    asked, _, notes = converse("RESET", "say", "EXIT", "", " EXIT ")
    assert asked == ["(reset)", "say\nEXIT"] and "(new conversation)" in notes


def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt() -> None:
    asked, out, notes = converse("slow", "", "next", "", KeyboardInterrupt, "never", "")
    assert asked == ["slow", "next"] and out == "SL\nNEXT\n" and "(stopped)" in notes


def test_the_end_of_the_input_sends_what_was_typed() -> None:
    assert converse("last words")[0] == ["last words"]


def test_ask_prints_the_answers_alone(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["chat", str(tiny_model_path), *SHORT]
    assert app.main([*arguments, "--ask", "Hi", "--ask", "Again", "--no-streamer"]) == 0
    captured = capsys.readouterr()
    session = open_chat(tiny_model_path, dtype="float32", options=EIGHT)
    first, second = ("".join(session.ask(text)) for text in ("Hi", "Again"))
    assert captured.out == f"{first}\n{second}\n"
    assert captured.err.startswith(f"Loading {tiny_model_path}...\n")
    assert not captured.err.partition("\n")[2].strip(".\n")  # dots, if the machine is busy

    assert app.main([*arguments, "--ask", "Hi", "--ask", "RESET", "--ask", "Hi"]) == 0
    assert capsys.readouterr().out == f"{first}\n" * 2


def test_questions_through_a_pipe(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\r\n\r\nRESET\nHi"))
    assert app.main(["chat", str(tiny_model_path), *SHORT]) == 0
    captured = capsys.readouterr()
    answer = "".join(open_chat(tiny_model_path, dtype="float32", options=EIGHT).ask("Hi"))
    assert captured.out == f"{answer}\n" * 2


def test_every_flag_arrives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: list[tuple] = []

    def record(model: str, **given) -> FakeSession:
        seen.append((model, given.pop("options"), given))
        return FakeSession()

    monkeypatch.setattr(opening, "open_chat", record)
    flags = "--adapter a --prompt-template t --system s --bits 4 --device cpu --dtype float16"
    flags += " --trust-remote-code --max-new-tokens 9 --temperature 0.5 --top-k 3 --top-p 0.8"
    flags += " --repetition-penalty 1.1 --seed 7 --stop-words x --stop-words y --ask hey"
    assert app.main(["chat", str(tmp_path), *flags.split()]) == 0
    assert capsys.readouterr().out == "HEY\n"
    expected = {"adapter": Path("a"), "prompt_template": "t", "system": "s", "bits": 4}
    expected |= {"visual_encoder": None, "llava": None}
    expected |= {
        "device": "cpu",
        "dtype": "float16",
        "trust_remote_code": True,
        "trust_code": False,
    }
    options = GenerationOptions(9, 0.5, 3, 0.8, 1.1, 7, ("x", "y"))
    assert seen == [(str(tmp_path), options, expected)]


def test_an_option_without_effect_is_named(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.main(["chat", str(tiny_model_path), *SHORT, "--ask", "Hi", "--top-p", "0.5"]) == 0
    assert "--top-p has no effect without --temperature" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["work_dirs/none/iter_5"], "no such folder"),
        (["{model}", "--bits", "5"], "must be 4, 8 or 16"),
        (["{model}", "--top-k", "0"], "top_k = 0"),
        (["{model}", "--prompt-template", "vicunna"], "did you mean 'vicuna'"),
    ],
)
def test_mistakes_exit_with_2(
    tiny_model_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    given = [argument.format(model=tiny_model_path) for argument in arguments]
    assert app.main(["chat", *given, "--ask", "Hi"]) == 2
    assert says in capsys.readouterr().err


class _Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("out", "seen"), [(_Screen(), "A␛[2JB\n"), (io.StringIO(), "A\x1b[2JB\n")],
    ids=["terminal", "pipe"],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [True, False])
def test_an_answer_cannot_control_the_terminal(out, seen, streaming):
    out.seek(0)
    out.truncate()
    screen = terminal.Terminal(lambda prompt: "", out, io.StringIO(), streaming=streaming)
    screen.answer(FakeSession(), "a\x1b[2Jb")
    assert out.getvalue() == seen
