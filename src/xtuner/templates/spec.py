"""A named template as data: the text around each message.

Your own template is an object of this class, given as ``prompt_template = "my_templates.py:MINE"``:

    MINE = Spec(user="Q: {content}\\n", assistant="A:", answer=" {content}{eos}", after="\\n")

renders ``Q: hello\\nA: hi</s>\\nQ: …``, where `` hi</s>`` is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_FIELD = re.compile(r"\{(content|system|round|bos|eos)\}")
_ALLOWED = {
    "start": {"bos", "eos"},
    "system": {"bos", "eos", "content"},
    "user": {"bos", "eos", "content", "round"},
    "system_in_user": {"bos", "eos", "content", "system"},
    "assistant": {"bos", "eos"},
    "answer": {"bos", "eos", "content"},
    "after": {"bos", "eos"},
    "stop": {"bos", "eos"},
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The pieces of a template. ``{bos}`` and ``{eos}`` are the tokenizer's BOS and EOS tokens.

    Attributes:
        user: a user turn, with ``{content}``; ``{round}`` counts user turns from 1.
        assistant: opens an assistant turn; every prompt ends with it.
        answer: an answer with ``{content}`` and the stop; all of it is supervised.
        stop: ends an answer; part of `answer` after ``{content}``.
        after: text after an answer that is not supervised, such as a line break.
        start: written once at the start.
        system: a system message, with ``{content}``.
        system_in_user: for models without system turns: combines the system message, ``{system}``,
            with the first user message, ``{content}``. Cannot be combined with `system`.
        default_system: the system message that the model was trained with, if any.
        stop_words: further strings that end generation.
        tokens: strings that should each be a single token of the model.
        stop_opens_next: the stop is also the first token of a user turn and is written once.
    """

    user: str
    assistant: str
    answer: str = "{content}{eos}"
    stop: str = "{eos}"
    after: str = ""
    start: str = ""
    system: str = ""
    system_in_user: str = ""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    stop_opens_next: bool = False

    def problems(self) -> Iterator[str]:
        """Yield the problems of the pieces."""
        for piece, allowed in _ALLOWED.items():
            for name in _FIELD.findall(getattr(self, piece)):
                if name not in allowed:
                    yield f"{piece}: cannot contain {{{name}}}; allowed: {_braced(allowed)}"
        required = {"user": "content", "answer": "content", "system": "content"}
        for piece, name in required.items():
            text = getattr(self, piece)
            if (text or piece != "system") and f"{{{name}}}" not in text:
                yield f"{piece}: must contain {{{name}}}; it is {text!r}"
        if not self.stop or self.stop not in self.answer.partition("{content}")[2]:
            yield (
                f"answer: must contain the stop {self.stop!r} after {{content}}; "
                f"it is {self.answer!r}"
            )
        if bool(self.system) == bool(self.system_in_user):
            yield "system, system_in_user: set exactly one of the two"
        if self.system_in_user and "{system}" not in self.system_in_user:
            yield "system_in_user: must contain {system} and {content}"
        if self.stop_opens_next and not self.user.startswith(self.stop):
            yield "stop_opens_next: user must begin with the stop"


def fill(piece: str, values: Mapping[str, str]) -> str:
    """Replace the fields of `piece` with `values`; braces within a value are kept."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), piece)


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))
