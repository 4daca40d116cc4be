"""The chat template saved with a model renders the same text as the template object."""

import pytest

from xtuner import templates
from xtuner.templates.jinja import as_jinja
from xtuner.testing.tiny import tiny_tokenizer
from xtuner.types import Message

TURNS = [
    Message("user", "What is it?"),
    Message("assistant", 'A "cat".\nIt is {grey} \\ 灰.'),
    Message("user", " And now? "),
]


@pytest.mark.parametrize("system", ["", "Be kind.\n'Always'."])
@pytest.mark.parametrize("name", templates.names())
def test_renders_the_same(name, system):
    tokenizer = tiny_tokenizer()
    template = templates.load(name, tokenizer, system=system)
    source = as_jinja(template, tokenizer)
    for messages in (TURNS[:1], TURNS[:2], TURNS, [Message("system", "Other."), *TURNS]):
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        parts = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}]} for m in messages
        ]
        prompt = messages[-1].role == "user"
        wanted = template.render(messages, prompt=prompt).text
        for given in (dicts, parts):
            got = tokenizer.apply_chat_template(
                given, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert got == wanted


def test_image_is_rendered_as_token_and_line():
    tokenizer = tiny_tokenizer()
    template = templates.load("chatml", tokenizer)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    got = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=as_jinja(template, tokenizer), tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    wanted = template.render([Message("user", "<image>\nWhat is it?")], prompt=True).text
    assert got == wanted
