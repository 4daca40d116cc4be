"""The loop of calls and results, with scripted answers."""

from contextlib import closing

from xtuner.calls.families import load
from xtuner.calls.read import arguments_of, make_call
from xtuner.tools.loop import Called, Malformed, Returned, Stopped, Text, converse
from xtuner.tools.provider import Result
from xtuner.tools.toolbox import ToolBox
from xtuner.types import Message

ASK = Message("user", "What is 37 times 49?")
SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": SCHEMA}}
HERMES = load("hermes")


class Provider:
    schemas = (TOOL,)

    def __init__(self):
        self.ran = []

    def call(self, name, arguments, *, timeout):
        self.ran.append(arguments)
        return Result(str(eval(arguments["expression"])))

    def close(self):
        pass


def calls(*expressions):
    return HERMES.render([make_call("calculator", {"expression": e}) for e in expressions])


def run(*answers, allow=lambda call: True, rounds=8):
    given, left = [], list(answers)

    def answer(messages):
        given.append(list(messages))
        yield from left.pop(0)

    provider = Provider()
    steps = converse(answer, [ASK], tools=ToolBox([provider]), family=HERMES, allow=allow,
                     max_rounds=rounds)  # fmt: skip
    events = []
    while True:
        try:
            events.append(next(steps))
        except StopIteration as stop:
            return events, stop.value, given, provider.ran


def text(events):
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_call_its_result_and_the_answer():
    events, new, given, ran = run(f"I calculate.\n{calls('37*49')}", "It is 1813.")
    assert [type(e) for e in events if not isinstance(e, Text)] == [Called, Returned]
    assert text(events) == "I calculate.\nIt is 1813."
    call = new[0].tool_calls[0]
    assert (call["id"], arguments_of(call)) == ("call00001", {"expression": "37*49"})
    assert new == [
        Message("assistant", "I calculate.", tool_calls=(call,)),
        Message("tool", "1813", name="calculator", tool_call_id="call00001"),
        Message("assistant", "It is 1813."),
    ]
    assert given[1] == [ASK, *new[:2]] and ran == [{"expression": "37*49"}]


def test_several_calls_at_once_and_numbers_of_ids():
    _, new, _, ran = run(calls("1+1", "2+2"), calls("3+3"), "Done.")
    ids = [m.tool_call_id for m in new if m.role == "tool"]
    assert ids == ["call00001", "call00002", "call00003"] and len(ran) == 3


def test_a_call_that_is_not_allowed_does_not_run():
    events, new, _, ran = run(calls("1+1"), "Then not.", allow=lambda call: False)
    assert ran == [] and "did not allow" in new[1].content
    assert events[1].result.failed


def test_errors_are_returned_to_the_model():
    wrong = HERMES.render([make_call("calculater", {"expression": "1"})])
    _, new, _, ran = run(wrong, '<tool_call>{"name": "calc', "I give up.")
    assert "no tool 'calculater'" in new[1].content and ran == []
    assert new[2] == Message("assistant", '<tool_call>{"name": "calc')
    assert new[3].role == "user" and "is incomplete" in new[3].content
    assert new[4].content == "I give up."


def test_a_malformed_call_is_shown():
    events, *_ = run("<tool_call>{x}</tool_call>", "Sorry.")
    assert next(e.problem for e in events if isinstance(e, Malformed)).startswith("is not valid")


def test_the_rounds_are_counted():
    events, new, given, _ = run(*[calls("1+1")] * 3, rounds=3)
    assert events[-1] == Stopped(3) and len(given) == 3 and new[-1].role == "tool"


def test_closing_the_loop_closes_the_answer():
    closed = []

    def answer(messages):
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    steps = converse(answer, [ASK], tools=ToolBox([Provider()]), family=HERMES)
    with closing(steps):
        assert next(steps) == Text("a")
    assert closed == [True]


def test_turns_are_made_of_what_the_model_wrote_by_the_template():
    answers = iter([f"Hm.</think>{calls('1+1')}", "So.</think>It is 2."])

    def turn_of(said):
        thought, _, content = said.partition("</think>")
        return Message("assistant", content, reasoning=thought)

    new = []
    steps = converse(lambda messages: iter_of(next(answers)), [ASK], tools=ToolBox([Provider()]),
                     family=HERMES, new=new, turn_of=turn_of)  # fmt: skip
    list(steps)
    assert [(m.reasoning, m.content) for m in new if m.role == "assistant"] == [
        ("Hm.", ""), ("So.", "It is 2."),
    ]  # fmt: skip
    assert new[0].tool_calls


def iter_of(text):
    yield text
