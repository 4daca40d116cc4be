"""Calls as JSON: between tags (Hermes, Qwen, Phi-4, ...), or alone (Llama 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section, after, read_json
from xtuner.calls.read import arguments_of, name_of
from xtuner.calls.scan import json_end, loads, skip_space


def dumped(value: Any) -> str:
    """JSON on one line; letters of all scripts stay as they are."""
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class TaggedJson:
    """``OPEN{"name": ..., "arguments": {...}}CLOSE`` for each call, or a list for all of them."""

    name: str
    opening: str
    closing: str
    as_list: bool = False
    newline: bool = False
    names: str = "name"
    arguments: str = "arguments"
    ids: str = ""
    only_at_start: bool = False

    @property
    def opens(self) -> tuple[str, ...]:
        """See `Family`."""
        return (self.opening,)

    @property
    def markers(self) -> tuple[str, ...]:
        """See `Family`."""
        return tuple(word for word in (self.opening, self.closing) if word)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        values = [self._value(call) for call in calls]
        space = "\n" if self.newline else ""
        parts = [dumped(values)] if self.as_list else [dumped(value) for value in values]
        return "\n".join(f"{self.opening}{space}{part}{space}{self.closing}" for part in parts)

    def _value(self, call: Mapping[str, Any]) -> dict[str, Any]:
        value: dict[str, Any] = {self.names: name_of(call), self.arguments: arguments_of(call)}
        return {self.ids: call["id"], **value} if self.ids and "id" in call else value

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        start = skip_space(text, len(self.opening))
        if start < len(text) and text[start] not in "{[":
            return self._without_json(text, start)
        end = json_end(text, start)
        if end is None:
            return None
        stop = after(text, end, self.closing)
        return None if stop is None else Section(read_json(text[start:end]), stop)

    def _without_json(self, text: str, start: int) -> Section | None:
        """The text between the tags is not JSON: it ends at the closing tag."""
        if not self.closing:
            return Section((), 0)
        end = text.find(self.closing, start)
        if end < 0:
            return None
        found = Found(None, text[start:end], "is not valid JSON")
        return Section((found,), end + len(self.closing))

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: the closing tag may be missing, or quotes may be unbalanced."""
        start = skip_space(text, len(self.opening))
        end = json_end(text, start)
        if end is not None and text[start : start + 1] in ("{", "["):
            return Section(read_json(text[start:end]), end)
        stop = text.find(self.closing, start) if self.closing else -1
        if stop < 0:
            return None
        return Section(read_json(text[start:stop].strip()), stop + len(self.closing))


@dataclass(frozen=True)
class BareJson:
    """The answer is ``{"name": ..., "parameters": {...}}``, or several with ``;`` between them."""

    name: str
    only_at_start: bool = True
    opens: tuple[str, ...] = ("{", "<|python_tag|>", ";")
    markers: tuple[str, ...] = ("<|python_tag|>",)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return "; ".join(
            dumped({"name": name_of(call), "parameters": arguments_of(call)}) for call in calls
        )

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        start = skip_space(text, 0)
        for word in (";", self.markers[0]):
            if text.startswith(word, start):
                start = skip_space(text, start + len(word))
        if start < len(text) and text[start] != "{":
            undecided = self.markers[0].startswith(text[start:])
            return None if undecided else Section((), 0)
        end = json_end(text, start)
        if end is None:
            return None
        if not self._is_call(text[start:end]):
            return Section((), 0)
        return Section(read_json(text[start:end]), end)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: JSON that does not begin like a call is text."""
        begun = text.lstrip(" \n;").removeprefix(self.markers[0]).lstrip()
        looks = begun.startswith(('{"name"', '{"type": "function"', '{"function"'))
        return None if looks else Section((), 0)

    def _is_call(self, text: str) -> bool:
        try:
            value = loads(text)
        except ValueError:
            return '"name"' in text and ('"parameters"' in text or '"arguments"' in text)
        if not isinstance(value, Mapping):
            return False
        inner = value["function"] if isinstance(value.get("function"), Mapping) else value
        named = "name" in inner or isinstance(inner.get("function"), str)
        return named and ("parameters" in inner or "arguments" in inner)
