"""InternLM2's protocol: ``<|action_start|><|plugin|>`` with JSON, or ``<|interpreter|>`` with code.

The ids of these tokens in its vocabulary are 92541 (action_start), 92540 (action_end), 92539
(interpreter) and 92538 (plugin).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section, after, read_json
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import json_end, skip_space

START, END = "<|action_start|>", "<|action_end|>"
PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
CODE_TOOL = "python_interpreter"
"""The tool whose calls are written as code, and whose only argument is `code`."""
_FENCE = "```python\n"
_FENCE_END = "\n```"


def is_code(call: Mapping[str, Any]) -> bool:
    """Whether a call is written as a code block."""
    arguments = arguments_of(call)
    return (
        name_of(call) == CODE_TOOL
        and isinstance(arguments, Mapping)
        and (list(arguments) == ["code"] and isinstance(arguments["code"], str))
    )


@dataclass(frozen=True)
class InternLM2:
    """See the module."""

    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = (START,)
    markers: tuple[str, ...] = (START, END, PLUGIN, INTERPRETER)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return "".join(self._one(call) for call in calls)

    def _one(self, call: Mapping[str, Any]) -> str:
        arguments = arguments_of(call)
        if is_code(call):
            return f"{START}{INTERPRETER}\n{_FENCE}{arguments['code']}{_FENCE_END}{END}"
        inner = dumped({"name": name_of(call), "parameters": arguments})
        return f"{START}{PLUGIN}\n{inner}{END}"

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        start = len(START)
        if text.startswith(PLUGIN, start):
            begin = skip_space(text, start + len(PLUGIN))
            end = json_end(text, begin) if text[begin : begin + 1] in ("{", "[") else None
            if end is None:
                return self._closed(text, begin) if text[begin : begin + 1] not in "{[" else None
            stop = after(text, end, END)
            return None if stop is None else Section(read_json(text[begin:end]), stop)
        if text.startswith(INTERPRETER, start):
            return self._code(text, start + len(INTERPRETER))
        if any(word.startswith(text[start:]) for word in (PLUGIN, INTERPRETER)):
            return None
        return self._closed(text, start)

    def _code(self, text: str, start: int) -> Section | None:
        end = text.find(_FENCE_END + END, start)
        if end < 0:
            end = text.find(END, start)
            if end < 0:
                return None
            code, stop = text[start:end].strip(), end + len(END)
        else:
            code, stop = text[start:end], end + len(_FENCE_END + END)
        code = code.removeprefix("\n").removeprefix(_FENCE)
        return Section((Found(make_call(CODE_TOOL, {"code": code}), text[:stop]),), stop)

    def _closed(self, text: str, start: int) -> Section | None:
        """Something that is neither JSON nor code, up to the end of the action."""
        end = text.find(END, start)
        if end < 0:
            return None
        return Section((Found(None, text[start:end], "is not valid JSON"),), end + len(END))

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: the end of the action may be missing, or be within open quotes."""
        start = len(START) + len(PLUGIN)
        if not text.startswith(PLUGIN, len(START)):
            return None
        begin = skip_space(text, start)
        end = json_end(text, begin)
        if end is not None and text[begin : begin + 1] in ("{", "["):
            return Section(read_json(text[begin:end]), end)
        return self._closed(text, begin)
