"""Thought, Action, Action Input: the layout of ReAct, in lagent, ToolBench and Agent-FLAN."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section, checked
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of, python_literal
from xtuner.calls.scan import json_end, skip_space

ACTION, INPUT = "Action:", "Action Input:"
_HEAD = re.compile(r"Action:[ \t]*([^\n]*)\n+\s*Action Input:[ \t]*")


@dataclass(frozen=True)
class React:
    """``Action: NAME``, a line break, ``Action Input: {...}``; the text before is the thought."""

    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = (ACTION,)
    markers: tuple[str, ...] = ()

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return "\n".join(
            f"{ACTION} {name_of(call)}\n{INPUT} {dumped(arguments_of(call))}" for call in calls
        )

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        head = _HEAD.match(text)
        if head is None:
            _, broken, rest = text.partition("\n")
            more = not broken or INPUT.startswith(rest.strip()[: len(INPUT)])
            return None if more else Section((), 0)
        start = skip_space(text, head.end())
        if start == len(text):
            return None
        if text[start] != "{":
            return self._line(text, head[1], start, ended=False)
        end = json_end(text, start)
        if end is None:
            return None
        return Section((self._found(head[1], text[start:end], text[:end]),), end)

    def _line(self, text: str, name: str, start: int, *, ended: bool) -> Section | None:
        """An input that is not an object, up to the end of its line."""
        end = text.find("\n", start)
        if end < 0 and not ended:
            return None
        end = end if end >= 0 else len(text)
        return Section((self._found(name, text[start:end], text[:end]),), end)

    def _found(self, name: str, arguments: str, text: str) -> Found:
        try:
            value = python_literal(arguments)
        except ValueError:
            value = arguments
        return checked(make_call(name.strip().strip("`"), value), text)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: an action without input is cut off; without a name it is text."""
        head = _HEAD.match(text)
        if head is None:
            return None if text.partition(":")[2].strip() else Section((), 0)
        start = skip_space(text, head.end())
        if text[start : start + 1] in ("{", ""):
            return None
        return self._line(text, head[1], start, ended=True)
