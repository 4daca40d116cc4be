"""Conversations of the page: the answers of `chat`, side by side, stopped, and refused."""

import pytest

from xtuner.chat.opening import open_chat
from xtuner.errors import ConfigError
from xtuner.generation.generate import GenerationOptions
from xtuner.types import Message
from xtuner.web.conversation import Asked, answer
from xtuner.web.turns import Turn

OPTIONS = GenerationOptions(max_new_tokens=10)


def opened(site, *names):
    return [site.pool.open(str(site.folders.runs / name)).result() for name in names]


def ask(site, names, text, *, histories=None, turn=None, **options):
    models = opened(site, *names)
    asked = Asked(text, options=OPTIONS, system=models[0].template.system, **options)
    histories = histories or [()] * len(names)
    return list(answer(site.engine, models, histories, asked, turn or Turn()))


def test_answers_side_by_side_are_those_of_chat(site):
    names = ["ada", "bob"]
    models = opened(site, *names)
    assert models[0].weights is models[1].weights
    last = ask(site, names, "Who are you?")[-1]
    for side, name in zip(last, names, strict=True):
        session = open_chat(
            site.folders.runs / name, options=OPTIONS, dtype="float32", system="ada"
        )
        assert side.text == "".join(session.ask("Who are you?"))
        assert side.history == tuple(session.messages)
    assert "" != last[0].text != last[1].text != ""


def test_a_conversation_goes_on(site):
    first = ask(site, ["ada"], "Who are you?")[-1][0]
    second = ask(site, ["ada"], "And now?", histories=[first.history])[-1][0]
    session = open_chat(site.folders.runs / "ada", options=OPTIONS, dtype="float32")
    "".join(session.ask("Who are you?"))
    assert second.text == "".join(session.ask("And now?"))
    assert [m.role for m in second.history] == ["user", "assistant"] * 2


def test_stopped_answer_keeps_its_text(site):
    turn = Turn()
    turn.stopped.set()
    (side,) = ask(site, ["bob"], "Who are you?", turn=turn)[-1]
    complete = ask(site, ["bob"], "Who are you?")[-1][0].text
    assert side.text and complete.startswith(side.text) and side.text != complete
    assert side.history == (Message("user", "Who are you?"), Message("assistant", side.text))


def test_errors_are_reported(site):
    (side,) = ask(site, ["ada"], "x" * 3000)[-1]
    assert "context length" in side.error and side.history is None
    (side,) = ask(site, ["ada"], "?", template="evil.py:T")[-1]
    assert "not a named template" in side.error
    (side,) = ask(site, ["ada"], "?", images=("x.png",))[-1]
    assert "does not take images" in side.error


def test_another_template_changes_the_prompt(site):
    texts = {ask(site, ["ada"], "Who?", template=name)[-1][0].text for name in ("auto", "default")}
    assert len(texts) == 2


def test_models_outside_the_folders_are_rejected_and_unknown_ones_reported(site, tmp_path):
    with pytest.raises(ConfigError, match="outside the folders"):
        site.pool.open(str(tmp_path))
    opening = site.pool.open(str(site.folders.runs / "nobody"))
    assert opening.finished.wait(20) and "no such folder" in str(opening.error)


def test_the_choices_are_given_models_and_checkpoints(site):
    labels = [choice.label for choice in site.pool.choices()]
    assert labels[0] == "tiny" and {"ada · iter_7", "bob · iter_7"} <= set(labels)


def test_the_oldest_weights_are_unloaded(folder, site):
    from xtuner.testing.tiny import tiny_model_folder
    from xtuner.web.models import ModelPool

    pool = ModelPool(site.engine, site.folders, device="cpu", dtype="float32")
    others = [tiny_model_folder(folder / f"other{i}", seed=i) for i in (1, 2)]
    first = pool.open(str(folder / "tiny"))
    served = [first.result(), *(pool.open(str(other)).result() for other in others)]
    assert len({id(each.weights) for each in served}) == 3
    assert pool.open(str(others[0])).result() is served[1]
    assert pool.open(str(folder / "tiny")) is not first
