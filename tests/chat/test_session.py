import pytest
from scripted_model import ScriptedModel
from template_makers import THINKS

from xtuner import templates
from xtuner.chat.session import Session
from xtuner.errors import ModelError
from xtuner.generation.generate import GenerationOptions
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import Conversation, Message

TOKENIZER = tiny_tokenizer()


def make_session(text: str = "fine<|im_end|>", *, system: str = "", **model_options) -> Session:
    return Session(
        ScriptedModel(TOKENIZER(text)["input_ids"], **model_options),
        TOKENIZER,
        template=templates.load("auto", TOKENIZER, system=system),
        options=GenerationOptions(max_new_tokens=8),
    )


def test_the_next_prompt_holds_the_conversation_as_training_would_show_it() -> None:
    session = make_session(system="Be kind.")
    assert "".join(session.ask("How are you?")) == "fine"
    assert "".join(session.ask("And now?")) == "fine"
    said = [
        Message("user", "How are you?"),
        Message("assistant", "fine"),
        Message("user", "And now?"),
    ]
    assert session.messages == [*said, Message("assistant", "fine")]
    trained = session.template.encode(Conversation(tuple(session.messages))).input_ids
    prompt = session.model.prompts[1]
    assert trained[: len(prompt)] == prompt
    assert "Be kind." in TOKENIZER.decode(prompt)


def test_a_thought_that_the_prompt_opens_is_the_reasoning_as_in_the_data() -> None:
    """The history of the chat is that of the training sequence, whatever the model wrote."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKS
    template = templates.load("auto", tokenizer)
    session = Session(
        ScriptedModel(tokenizer("Hm.\n</think>\n\nfine<|im_end|>")["input_ids"]),
        tokenizer,
        template=template,
        options=GenerationOptions(max_new_tokens=64),
    )
    for question in ("How are you?", "And now?"):
        assert "".join(session.ask(question)) == "Hm.\n</think>\n\nfine"
    assert session.messages[1] == Message("assistant", "fine", reasoning="Hm.")
    last, first = template.sequences(Conversation(tuple(session.messages)))
    for prompt, (ids, *_) in zip(session.model.prompts, (first, last), strict=True):
        assert tokenizer.decode(prompt).endswith("<think>\n")
        assert ids == [*prompt, *tokenizer("Hm.\n</think>\n\nfine<|im_end|>")["input_ids"]]


def test_reset_forgets() -> None:
    session = make_session()
    first = "".join(session.ask("One"))
    session.reset()
    assert session.messages == [] and "".join(session.ask("One")) == first
    assert session.model.prompts[0] == session.model.prompts[1]


def test_stopped_answer_is_kept_as_shown() -> None:
    session = make_session()
    answer = session.ask("Hm?")
    assert next(answer) + next(answer) == "fi"
    answer.close()
    assert session.messages == [Message("user", "Hm?"), Message("assistant", "fi")]


def test_a_failed_question_leaves_no_trace() -> None:
    session = make_session(fails_at=1)
    with pytest.raises(RuntimeError):
        list(session.ask("Hm?"))
    assert session.messages == []


def test_the_oldest_questions_go_when_the_context_is_full(caplog: pytest.LogCaptureFixture) -> None:
    session = make_session(length=150, system="Be kind.")
    for number in range(6):
        assert "".join(session.ask(f"Question {number}?")) == "fine"
    last = TOKENIZER.decode(session.model.prompts[-1])
    assert "Be kind." in last and "Question 5" in last and "Question 0" not in last
    assert "exceeds the model's context of 150 tokens" in caplog.text
    with pytest.raises(ModelError, match="the context length of the model is 150"):
        list(session.ask("x" * 200))
