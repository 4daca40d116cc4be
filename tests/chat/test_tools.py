"""A session and a terminal with tools, with a model whose answers are scripted."""

import io

import pytest
from scripted_model import Answers

from xtuner import templates
from xtuner.calls.families import load
from xtuner.calls.read import make_call
from xtuner.chat.session import Session, ToolUse
from xtuner.chat.terminal import Terminal
from xtuner.cli.app import main
from xtuner.errors import ConfigError
from xtuner.generation.generate import GenerationOptions
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.tools import loop
from xtuner.tools.provider import Result
from xtuner.tools.toolbox import ToolBox
from xtuner.types import Conversation

TOKENIZER = tiny_tokenizer()
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = load("hermes").render([make_call("weather", {"city": "Rome"})])


class Weather:
    schemas = (TOOL,)
    fails = False

    def call(self, name, arguments, *, timeout):
        if self.fails:
            raise KeyboardInterrupt
        return Result(f"sunny in {arguments['city']}\x1b[2J")

    def close(self):
        pass


def make_session(*answers, provider=None, **options):
    return Session(
        Answers(TOKENIZER, *answers),
        TOKENIZER,
        template=templates.load("auto", TOKENIZER),
        options=GenerationOptions(max_new_tokens=200),
        tools=ToolUse(ToolBox([provider or Weather()]), **options),
    )


def test_calls_and_results_are_part_of_the_history_as_training_shows_it():
    session = make_session(f"I look.\n{CALL}", "Sunny.", "Yes.")
    events = list(session.act("Weather in Rome?"))
    assert [type(e) for e in events if not isinstance(e, loop.Text)] == [
        loop.Called, loop.Returned,
    ]  # fmt: skip
    assert [m.role for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert "".join(session.ask("Sure?")) == "Yes."
    record = Conversation(tuple(session.messages), (TOOL,))
    trained = session.template.encode(record).input_ids
    for prompt in session.model.prompts:
        assert trained[: len(prompt)] == prompt


def test_a_stopped_answer_keeps_what_is_complete():
    session = make_session(CALL, "Sunny and warm.")
    steps = session.act("Weather?")
    for event in steps:
        if isinstance(event, loop.Text):
            break
    steps.close()
    assert [m.role for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[-1].content == "S"


def test_interrupted_call_is_removed_from_the_history():
    provider = Weather()
    provider.fails = True
    session = make_session(f"Hm.{CALL}", provider=provider)
    with pytest.raises(KeyboardInterrupt):
        list(session.act("Weather?"))
    assert not any(message.tool_calls for message in session.messages)


def terminal(*lines):
    given = iter(lines)
    return Terminal(lambda prompt: next(given), io.StringIO(), io.StringIO())


def test_the_terminal_shows_calls_and_asks_for_them():
    shown = terminal("what?", "n", "a")
    session = make_session(
        CALL, CALL, CALL, "Done.", allow=lambda call: shown.allow(call, always=False)
    )
    shown.answer(session, "Weather?")
    assert shown.out.getvalue() == "Done.\n"
    notes = shown.notes.getvalue().splitlines()
    assert notes.count("→ weather(city='Rome')") == 3
    assert notes.count("← sunny in Rome�[2J") == 2  # one was refused; control characters are shown
    assert "← Error: the user did not allow this call" in notes
    assert shown.trusted == {"weather"}


def test_tools_without_a_terminal_need_yes(capsys, tiny_model_path):
    assert main(["chat", str(tiny_model_path), "--tools", "clock", "--ask", "Hi"]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert main(["chat", str(tiny_model_path), "--yes", "--ask", "Hi"]) == 2
    assert "--yes has no effect without --tools" in capsys.readouterr().err


def test_wrong_tools_are_named_before_the_model_is_loaded(capsys):
    wrong = ["--tools", "calculater", "--tools", "read_file", "--ask", "Hi"]
    assert main(["chat", "no/such/model", *wrong]) == 2
    told = capsys.readouterr().err
    assert "did you mean 'calculator'?" in told and "read_file: needs the folder" in told
    assert "add --yes" in told and "no/such/model" not in told


def test_chat_with_a_tool_runs(capsys, tiny_model_path):
    command = ["chat", str(tiny_model_path), "--tools", "calculator", "--yes", "--ask", "Hi"]
    assert main([*command, "--max-new-tokens", "3", "--answer-stop-word", "<eom>"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_xtuner_0_command_lines():
    from xtuner.cli import _chat_tools, _old_words

    command = "chat m --with-plugins calculate solve --command-stop-word <eoc> --bits 4"
    assert " ".join(_old_words.translated(command.split())) == (
        "chat m --with-plugins calculate --with-plugins solve --stop-words <eoc> --bits 4"
    )
    assert _chat_tools.names([], with_plugins=["calculate", "solve", "search"]) == [
        "Calculate=calculator", "Solve=solve",
    ]  # fmt: skip
    assert _chat_tools.names(["clock"], lagent=True) == [
        "clock", "python_interpreter", "calculator",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="no search service"):
        _chat_tools.names([], with_plugins=["search"])
    with pytest.raises(ConfigError, match="must be calculate, solve or search"):
        _chat_tools.names([], with_plugins=["text2image"])


def test_markers_that_are_special_tokens_reach_the_parser():
    """InternLM2's are; they are left out of an answer's text otherwise."""
    from template_makers import byte_tokenizer

    from xtuner.calls.families.base import parse
    from xtuner.generation.detokenize import Detokenizer

    markers = load("internlm2").markers
    tokenizer = byte_tokenizer(tokens=("<unk>", "<s>", "</s>", "<|im_end|>", *markers))
    text = load("internlm2").render([make_call("weather", {"city": "Zürich 🙂"})])
    for keep, found in ((markers, 1), ((), 0)):
        decoder = Detokenizer(tokenizer, keep=keep)
        ids = tokenizer(f"Hm é{text}<|im_end|>")["input_ids"]
        shown = "".join([*map(decoder.add, ids), decoder.rest()])
        assert len(parse(load("internlm2"), shown)[1]) == found
        assert "<|im_end|>" not in shown and shown.startswith("Hm é")
