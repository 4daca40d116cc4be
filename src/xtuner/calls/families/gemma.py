"""Gemma 4: ``<|tool_call>call:NAME{city:<|"|>Rome<|"|>,days:2}<tool_call|>``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import loads

BEGIN, END, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_TOKEN = re.compile(r'<\|"\|>(.*?)<\|"\|>|([{}\[\],:])|([^{}\[\],:]+)', re.DOTALL)
_BARE_KEY = re.compile(r"[\w.-]+")
_MOST_LEVELS = 100


def _written(value: Any) -> str:
    """A value as Gemma writes it."""
    if isinstance(value, str):
        return f"{QUOTE}{value}{QUOTE}"
    if isinstance(value, Mapping):
        pairs = (f"{_key(str(key))}:{_written(item)}" for key, item in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return dumped(value)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else f"{QUOTE}{key}{QUOTE}"


class _Reader:
    """Reads one value; raises ValueError if the text is not a value."""

    def __init__(self, text: str) -> None:
        self._tokens = self._split(text)
        self._next = next(self._tokens, ("end", ""))

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        for match in _TOKEN.finditer(text):
            if match[1] is not None:
                yield "text", match[1]
            elif match[2]:
                yield match[2], ""
            elif match[3].strip():
                yield "word", match[3].strip()

    def _take(self, *kinds: str) -> tuple[str, str]:
        token = self._next
        if token[0] not in kinds:
            raise ValueError(f"{token[0]!r} is not expected")
        self._next = next(self._tokens, ("end", ""))
        return token

    def complete(self) -> Any:
        """The value; nothing may follow it."""
        value = self._value(0)
        self._take("end")
        return value

    def _value(self, level: int) -> Any:
        if level > _MOST_LEVELS:
            raise ValueError("is nested too deeply")
        kind, word = self._take("text", "word", "{", "[")
        if kind == "text":
            return word
        if kind == "word":
            return loads(word)
        if kind == "[":
            return list(self._items("]", level))
        return dict(self._items("}", level))

    def _items(self, closing: str, level: int) -> Iterator[Any]:
        if self._next[0] == closing:
            self._take(closing)
            return
        while True:
            if closing == "}":
                _, key = self._take("text", "word")
                self._take(":")
                yield key, self._value(level + 1)
            else:
                yield self._value(level + 1)
            if self._take(",", closing)[0] == closing:
                return


@dataclass(frozen=True)
class Gemma:
    """The name and the arguments, whose strings are between two ``<|"|>``."""

    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = (BEGIN,)
    markers: tuple[str, ...] = (BEGIN, END, QUOTE)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return "".join(
            f"{BEGIN}call:{name_of(call)}{_written(arguments_of(call))}{END}" for call in calls
        )

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`: the end inside a string is part of it."""
        end = text.find(END, len(BEGIN))
        while end >= 0:
            inner = text[len(BEGIN) : end]
            if inner.count(QUOTE) % 2 == 0:
                return Section((self._call(inner),), end + len(END))
            end = text.find(END, end + 1)
        return None

    def _call(self, inner: str) -> Found:
        match = re.fullmatch(r"\s*call:([\w.:-]+)(\{.*\})\s*", inner, re.DOTALL)
        try:
            if match is None:
                raise ValueError("no name")
            return Found(make_call(match[1], _Reader(match[2]).complete()), inner)
        except ValueError:
            return Found(None, inner, "does not have the form call:NAME{KEY:VALUE}")

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`."""
        return None
