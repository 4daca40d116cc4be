"""What counts as a correct call, and the command that measures it."""

import json

import pytest
from call_makers import make_calls

from xtuner.calls.families import load
from xtuner.calls.read import make_call
from xtuner.chat import tool_evaluation
from xtuner.cli.app import main
from xtuner.tools import evaluation as ev
from xtuner.types import Conversation, Message

ASK, TELL = Message("user", "Weather in Rome?"), Message("assistant", "Sunny.")
HERMES = load("hermes")
ROME = make_call("weather", {"city": "Rome", "days": 3})


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def record(*calls, names=("weather", "time")):
    turn = Message("assistant", "", tool_calls=calls)
    results = tuple(Message("tool", "x") for _ in calls)
    return Conversation((ASK, turn, *results, TELL), tuple(map(tool, names)))


def outcome(text, *calls):
    question = next(ev.questions_of(record(*(calls or (ROME,)))))
    return ev.outcome_of(question, text, HERMES)


def written(*calls):
    return HERMES.render(calls)


@pytest.mark.parametrize(
    ("text", "function", "arguments"),
    [
        (written(ROME), True, True),
        ("I look. " + written(make_call("weather", {"days": 3.0, "city": " Rome"})), True, True),
        (written(make_call("weather", {"city": "Rome"})), True, False),
        (written(make_call("weather", {"city": "Paris", "days": 3})), True, False),
        (written(make_call("time", {"city": "Rome", "days": 3})), False, False),
        (written(ROME, ROME), False, False),
        ("Sunny.", False, False),
        (written(ROME) + "<tool_call>{x}</tool_call>", False, False),
    ],
    ids=["same", "order", "fewer", "other", "function", "twice", "none", "malformed"],
)
def test_right_calls(text, function, arguments):
    found = outcome(text)
    assert (found.right_function, found.right_arguments) == (function, arguments)


def test_parallel_calls_count_in_any_order():
    paris = make_call("weather", {"city": "Paris"})
    assert outcome(written(paris, ROME), ROME, paris).right_arguments
    assert not outcome(written(paris), ROME, paris).right_function


def test_true_is_not_one():
    assert not outcome(
        written(make_call("f", {"a": 1})), make_call("f", {"a": True})
    ).right_arguments


def test_a_question_for_every_assistant_turn():
    questions = list(ev.questions_of(record(ROME)))
    assert [len(q.messages) for q in questions] == [1, 3]
    assert [len(q.expected) for q in questions] == [1, 0]
    greeting = Conversation((TELL, ASK, Message("assistant", "x", loss=False), TELL))
    assert len(list(ev.questions_of(greeting))) == 1


def test_shares():
    answer = list(ev.questions_of(record(ROME)))[1]
    outcomes = [
        outcome(written(ROME)),
        outcome("Sunny."),
        outcome("<tool_call>{x}</tool_call>"),
        outcome(written(make_call("weather", {"city": "x"}))),
        ev.outcome_of(answer, "Sunny.", HERMES),
        ev.outcome_of(answer, written(ROME), HERMES),
    ]
    shares = ev.Shares.of(outcomes)
    assert shares == ev.Shares(4, 0.5, 0.25, 0.75, 0.25, 2, 0.5)
    assert ev.Shares.of([]) == ev.Shares(0, None, None, None, None, 0, None)
    lines = list(tool_evaluation.table(outcomes, {"time"}))
    assert lines[0].split() == ["all", "seen", "tools", "held-out", "tools"]
    assert lines[2].split() == ["right", "function", "50", "%", "-", "50", "%"]


def test_split_by_tool_keeps_held_out_tools_out_of_training():
    records = [record(make_call(f"tool_{i % 5}", {}), names=[f"tool_{n}" for n in range(5)])
               for i in range(20)]  # fmt: skip
    names = ev.called_tools(records)
    chosen = ev.held_out_tools(names, 0.4)
    assert len(chosen) == 2 and chosen == ev.held_out_tools(sorted(names), 0.4)
    train, held = ev.split_by_tool(records, chosen)
    assert len(train) + len(held) == 20 and not ev.called_tools(train) & chosen
    assert not {t["function"]["name"] for r in train for t in r.tools} & chosen
    assert ev.called_tools(held) == chosen


def test_rows_come_back_as_they_were():
    from xtuner.data import formats

    first = record(*make_calls(3))
    row = json.loads(json.dumps(ev.as_openai_row(first)))
    again = formats.load("openai").convert(row)
    assert [m.tool_calls for m in again.messages] == [m.tool_calls for m in first.messages]
    assert [m.content for m in again.messages] == [m.content for m in first.messages]


def test_the_command_measures_splits_and_writes(tmp_path, tiny_model_path, capsys):
    rows = [ev.as_openai_row(record(make_call(name, {"city": "Rome"}), names=("a", "b", "c")))
            for name in "abc" * 2]  # fmt: skip
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": []}]))
    command = ["evaluate-tools", str(tiny_model_path), str(data), "--max-new-tokens", "4"]
    split = ["--split", str(tmp_path / "split"), "--held-out", "0.3"]
    assert main([*command, *split, "--out", str(tmp_path / "out.jsonl")]) == 0
    said = capsys.readouterr()
    assert "Held out 1 of 3 tools" in said.out and "turns with a call" in said.out
    assert "1 row cannot be used" in said.err and "data.jsonl line 7" in said.err
    train = (tmp_path / "split" / "train.jsonl").read_text().splitlines()
    held = (tmp_path / "split" / "held_out.jsonl").read_text().splitlines()
    assert (len(train), len(held)) == (4, 2)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
    assert main([*command, "--train-data", str(tmp_path / "split" / "train.jsonl"), "-n", "2"]) == 0
    assert "held-out tools" in capsys.readouterr().out


def test_data_without_calls_are_refused(tmp_path, tiny_model_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"},
                                             {"role": "assistant", "content": "b"}]}))  # fmt: skip
    assert main(["evaluate-tools", str(tiny_model_path), str(data)]) == 2
    assert "nothing to measure" in capsys.readouterr().err
