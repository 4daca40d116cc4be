"""Mistral: ``[TOOL_CALLS]`` with a list, or with names and ``[ARGS]``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Section, checked, read_json
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import json_end, skip_space

OPEN, ARGS, ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_HEAD = re.compile(r"([\w.-]+)(?:\[CALL_ID\]([\w-]+))?(?:\[ARGS\])?\s*")


@dataclass(frozen=True)
class Mistral:
    """See the module; calls are rendered as a list."""

    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = (OPEN,)
    markers: tuple[str, ...] = (OPEN, ARGS, ID)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        values = [
            {"name": name_of(call), "arguments": arguments_of(call)}
            | ({"id": call["id"]} if "id" in call else {})
            for call in calls
        ]
        return OPEN + dumped(values)

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        start = skip_space(text, len(OPEN))
        if start == len(text):
            return None
        if text[start] in "[{":
            end = json_end(text, start)
            return None if end is None else Section(read_json(text[start:end]), end)
        head = _HEAD.match(text, start)
        if head is None:
            return Section((), 0)
        end = json_end(text, head.end()) if text[head.end() : head.end() + 1] == "{" else None
        if end is None:
            return None
        call = make_call(head[1], text[head.end() : end], call_id=head[2])
        return Section((checked(call, text[:end]),), end)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`."""
        return None
