"""Tools in the page: calls are asked for, shown, and part of the conversation."""

import threading

import pytest
from scripted_model import Answers

from xtuner import i18n, templates
from xtuner.calls.families import load
from xtuner.calls.read import make_call
from xtuner.chat.session import ToolUse
from xtuner.generation.generate import GenerationOptions
from xtuner.serve.models import ServedModel, Weights
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.tools import loop
from xtuner.tools.provider import Result
from xtuner.tools.toolbox import ToolBox
from xtuner.types import Message
from xtuner.web import bubbles
from xtuner.web.conversation import Asked, Side, answer
from xtuner.web.turns import Turn, Turns

WORDS = i18n.words("en")
TOKENIZER = tiny_tokenizer()
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = load("hermes").render([make_call("weather", {"city": "Rome"})])


class Weather:
    schemas = (TOOL,)

    def __init__(self):
        self.cities = []

    def call(self, name, arguments, *, timeout):
        self.cities.append(arguments["city"])
        return Result("sunny <b>``` ")

    def close(self):
        pass


@pytest.fixture
def weather():
    return Weather()


def model(*answers, template="auto"):
    weights = Weights(Answers(TOKENIZER, *answers))
    return ServedModel("scripted", weights, TOKENIZER, templates.load(template, TOKENIZER))


def ask(site, models, weather, turn, *, reply=None, rounds=8, history=()):
    """The last states; each request is answered by `reply(request)`."""
    asked = Asked(
        "Weather in Rome?",
        options=GenerationOptions(max_new_tokens=200),
        tools=ToolUse(ToolBox([weather]), max_rounds=rounds),
    )
    states = []
    for states in answer(site.engine, models, [history] * len(models), asked, turn):
        for side in states:
            if side.request and reply:
                turn.reply(side.request.number, reply(side.request))
    return states


def kinds(entries):
    return [entry.get("metadata", {}).get("title", entry["role"]) for entry in entries]


def test_a_call_is_asked_for_and_shown_as_four_parts(site, weather):
    asked = []

    def allowed(request):
        asked.append(request.call["function"]["name"])
        assert not weather.cities
        return "yes"

    (side,) = ask(site, [model(f"I look.\n{CALL}", "Sunny.")], weather, Turn(), reply=allowed)
    assert asked == ["weather"] and weather.cities == ["Rome"]
    assert [m.role for m in side.history] == ["user", "assistant", "tool", "assistant"]
    shown = bubbles.of_history(side.history, WORDS)
    assert kinds(shown) == ["user", "Thought", "Call · weather", "Result · weather", "Answer"]
    assert shown[1:] == bubbles.of_side(Side(side.events, history=side.history), WORDS)
    assert '"city": "Rome"' in shown[2]["content"]
    assert shown[3]["content"] == "````\nsunny <b>``` \n````"


@pytest.mark.parametrize("how", ["refused", "stopped"])
def test_a_call_that_is_not_allowed_does_not_run(site, weather, how):
    turn = Turn()

    def reply(request):
        if how == "stopped":
            turn.stopped.set()
        return "no"

    (side,) = ask(site, [model(CALL, "Then not.")], weather, turn, reply=reply)
    assert weather.cities == []
    results = [m.content for m in side.history if m.role == "tool"]
    assert results == ([loop.NOT_ALLOWED] if how == "refused" else results)


def test_a_tool_that_is_always_allowed_is_asked_for_once_in_a_tab(site, weather):
    turns, asked = Turns(), []

    def reply(request):
        asked.append(request.number)
        return "always"

    for _ in range(2):
        ask(site, [model(CALL, CALL, "Sunny.")], weather, turns.begin("mine"), reply=reply)
    assert asked == [1] and len(weather.cities) == 4
    turns.forget("mine")
    ask(site, [model(CALL, "Sunny.")], weather, turns.begin("mine"), reply=reply)
    assert asked == [1, 1]
    ask(site, [model(CALL, "Sunny.")], weather, Turns(always=True).begin("mine"))
    assert len(weather.cities) == 6


def test_a_late_reply_allows_nothing_else():
    turn, asked = Turn(), []
    call = make_call("weather", {})
    allowed = []

    def run():
        for _ in range(2):
            allowed.append(turn.allow(call, asked.append))

    thread = threading.Thread(target=run)
    thread.start()
    while not asked:
        pass
    turn.reply(1, "yes")
    while len(asked) < 2:
        pass
    turn.reply(1, "yes")  # the second click on the button of the first call
    turn.reply(2, "no")
    thread.join()
    assert allowed == [True, False]


def test_calls_side_by_side_are_asked_for_one_after_the_other(site, weather):
    models = [model(CALL, "Left."), model(CALL, "Right.")]
    left, right = ask(site, models, weather, Turn(), reply=lambda request: "yes")
    assert left.history[-1].content == "Left." and right.history[-1].content == "Right."
    assert weather.cities == ["Rome", "Rome"]


def test_faults_of_calls_are_fed_back(site, weather):
    broken, wrong = '<tool_call>\n{"name": }\n</tool_call>', CALL.replace("city", "town")
    (side,) = ask(site, [model(broken, wrong, "Sorry.")], weather, Turn(always=True))
    titles = kinds(bubbles.of_history(side.history, WORDS))
    assert titles == ["user", "Answer", "Call that cannot be read", "Call · weather",
                      "Result · weather", "Answer"]  # fmt: skip
    assert "wrong arguments" in side.history[-2].content and weather.cities == []
    assert [m.content for m in bubbles.questions(side.history)] == ["Weather in Rome?"]
    assert bubbles.before(side.history, -1) == ()
    assert bubbles.question_at(side.history, 4, WORDS) == 0


def test_rounds_are_limited(site, weather):
    (side,) = ask(site, [model(CALL, CALL, CALL)], weather, Turn(always=True), rounds=2)
    assert side.rounds == 2 and weather.cities == ["Rome", "Rome"]


def test_a_template_whose_calls_are_unknown_answers_without_tools(site, weather):
    served = model("Hello.")
    kind = type(served.template)
    served.template.__class__ = type("Unknown", (kind,), {"tool_family": None})
    (side,) = ask(site, [served], weather, Turn())
    assert side.without_tools and side.text == "Hello."


def test_thoughts_of_the_model_are_folded():
    history = (Message("user", "?"), Message("assistant", "<think>\nHm.\n</think>\n\nYes."))
    shown = bubbles.of_history(history, WORDS)
    assert kinds(shown) == ["user", "Thought", "Answer"] and shown[1]["content"] == "Hm."
    assert kinds(bubbles.of_side(Side((loop.Text("<think>Hm"),)), WORDS)) == ["Thought"]
    assert kinds(bubbles.of_side(Side(), WORDS)) == ["assistant"]


def test_names_of_tools_contain_no_markup():
    call = make_call("<img src=x>[a](b)", {"x": "```\n<b>"})
    entries = bubbles.of_side(Side((loop.Called(call),), history=()), WORDS)
    assert kinds(entries) == ["Call · _img_src_x__a__b_"]
    assert entries[0]["content"] == "````\n```\n<b>\n````"
