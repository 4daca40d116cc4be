"""A named template as data: the text around each message.

Your own template is an object of this class, given as ``prompt_template = "my_templates.py:MINE"``:

    MINE = Spec(user="Q: {content}\\n", assistant="A:", answer=" {content}{eos}", after="\\n")

renders ``Q: hello\\nA: hi</s>\\nQ: …``, where `` hi</s>`` is supervised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from xtuner.calls.families import DEFAULT, FAMILIES

_FIELD = re.compile(r"\{(content|system|round|role|bos|eos)\}")
_MAX_CHARACTERS = 20_000
_KINDS = {"str": "a string", "bool": "true or false", "tuple[str, ...]": "a list of strings"}
_ALLOWED = {
    "start": {"bos", "eos"},
    "system": {"bos", "eos", "content"},
    "user": {"bos", "eos", "content", "round"},
    "system_in_user": {"bos", "eos", "content", "system"},
    "assistant": {"bos", "eos"},
    "answer": {"bos", "eos", "content"},
    "after": {"bos", "eos"},
    "further": {"bos", "eos", "content", "role"},
    "stop": {"bos", "eos"},
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """The pieces of a template. ``{bos}`` and ``{eos}`` are the tokenizer's BOS and EOS tokens.

    Attributes:
        user: A user turn, with ``{content}``; ``{round}`` counts user turns from 1.
        assistant: Opens an assistant turn; every prompt ends with it.
        answer: An answer with ``{content}`` and the stop; all of it is supervised.
        stop: The string that ends an answer; part of `answer` after ``{content}``.
        after: Text after an answer that is not supervised, such as a line break.
        start: Written once at the start.
        system: A system message, with ``{content}``.
        system_in_user: For models without system turns: combines the system message, ``{system}``,
            with the first user message, ``{content}``. Cannot be combined with `system`.
        default_system: The system message that the model was trained with, if any.
        stop_words: Further strings that end generation.
        tokens: Strings that should each be a single token of the model.
        stop_opens_next: The stop is also the first token of a user turn and is written once.
        tool_calls: How tool calls are written, a family of `xtuner.calls.families`.
        further: A turn of any other role, with ``{role}`` and ``{content}``. If it is set, tools
            and results are such turns (InternLM2's protocol); otherwise they are parts of system
            and user turns.
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
    tool_calls: str = DEFAULT
    further: str = ""

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> Spec:
        """Make a template of plain values, such as those in a checkpoint's run.yaml.

        Raises:
            ValueError: A field is unknown, missing, of another type, or longer than 20,000
                characters; or the pieces do not fit each other.
        """
        kinds = {field.name: field.type for field in fields(cls)}
        if unknown := [name for name in values if name not in kinds]:
            raise ValueError(f"has no field {unknown[0]!r}")
        given = {name: _plain(name, str(kinds[name]), value) for name, value in values.items()}
        try:
            spec = cls(**given)
        except TypeError:
            raise ValueError("lacks a field: user and assistant are needed") from None
        if problem := next(spec.problems(), None):
            raise ValueError(problem)
        return spec

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
        if self.tool_calls not in FAMILIES:
            yield f"tool_calls: must be one of {', '.join(FAMILIES)}; it is {self.tool_calls!r}"
        if self.further and not ("{role}" in self.further and "{content}" in self.further):
            yield f"further: must contain {{role}} and {{content}}; it is {self.further!r}"
        if self.stop_opens_next and not self.user.startswith(self.stop):
            yield "stop_opens_next: user must begin with the stop"


def fill(piece: str, values: Mapping[str, str]) -> str:
    """Replace the fields of `piece` with `values`; braces within a value are kept."""
    return _FIELD.sub(lambda match: values.get(match[1], match[0]), piece)


def _braced(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(names))


def _plain(name: str, kind: str, value: Any) -> Any:
    """`value` as the type `kind` of field `name`; ValueError if it is not of that type."""
    texts = [value] if kind == "str" else value
    if kind == "bool":
        if isinstance(value, bool):
            return value
    elif isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        if sum(map(len, texts)) > _MAX_CHARACTERS:
            raise ValueError(f"{name}: is longer than {_MAX_CHARACTERS:,} characters")
        return value if kind == "str" else tuple(texts)
    raise ValueError(f"{name}: must be {_KINDS[kind]}, and is {value!r:.60}")
