"""Calls as a name and a block of JSON: DeepSeek, Kimi, GLM-4."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from xtuner.calls.families.base import Found, Section, after, checked
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import json_end, skip_space

_NAME = re.compile(r"[\w.:-]+")


class _Section:
    """A section of blocks, one per call; a subclass renders and reads a block."""

    begin: ClassVar[str]
    end: ClassVar[str]
    call_begin: ClassVar[str]
    call_end: ClassVar[str]
    separator: ClassVar[str]

    @property
    def opens(self) -> tuple[str, ...]:
        """See `Family`."""
        return (self.begin,)

    @property
    def markers(self) -> tuple[str, ...]:
        """See `Family`."""
        return (self.begin, self.end, self.call_begin, self.call_end, self.separator)

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`: a section is complete with its end; calls are read one by one."""
        return self._read(text)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`."""
        return self._read(text, ended=True)

    def _read(self, text: str, *, ended: bool = False) -> Section | None:
        """Read blocks until the end of the section, or the complete ones if `ended`."""
        found: list[Found] = []
        at = len(self.begin)
        while True:
            at = skip_space(text, at)
            if text.startswith(self.end, at):
                return Section(tuple(found), at + len(self.end))
            if text.startswith(self.call_begin, at):
                block = self._call(text, at + len(self.call_begin))
                if block is not None:
                    found.append(block[0])
                    at = block[1]
                    continue
            if not ended:
                return None
            return Section(tuple(found), at) if found else None

    def _call(self, text: str, at: int) -> tuple[Found, int] | None:
        """The call of the block at `at`, and the index after it; None if it is incomplete."""
        raise NotImplementedError


@dataclass(frozen=True)
class DeepSeek(_Section):
    """``<｜tool▁calls▁begin｜>`` and blocks; V3 fences the arguments, V3.1 does not."""

    name: str
    fenced: bool
    only_at_start: bool = False

    begin = "<｜tool▁calls▁begin｜>"
    end = "<｜tool▁calls▁end｜>"
    call_begin = "<｜tool▁call▁begin｜>"
    call_end = "<｜tool▁call▁end｜>"
    separator = "<｜tool▁sep｜>"

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        space = "\n" if self.fenced else ""
        return self.begin + space.join(self._one(call) for call in calls) + self.end

    def _one(self, call: Mapping[str, Any]) -> str:
        arguments = dumped(arguments_of(call))
        if self.fenced:
            inner = f"function{self.separator}{name_of(call)}\n```json\n{arguments}\n```"
        else:
            inner = f"{name_of(call)}{self.separator}{arguments}"
        return self.call_begin + inner + self.call_end

    def _call(self, text: str, at: int) -> tuple[Found, int] | None:
        head, sign, _ = text[at:].partition(self.separator)
        if not sign:
            return None
        start = at + len(head) + len(sign)
        name = head.strip()
        brace = text.find("{", start)
        end = json_end(text, brace) if brace >= 0 else None
        if brace < 0 or end is None:
            return None
        if between := text[start:brace].replace("```json", "").strip():
            name = between
        stop = skip_space(text, end)
        stop = stop + 3 if text.startswith("```", stop) else end
        closed = after(text, stop, self.call_end)
        if closed is None:
            return None
        call = make_call(name, text[brace:end])
        return checked(call, text[at:end]), closed


@dataclass(frozen=True)
class Kimi(_Section):
    """Kimi K2: the id of a call holds its name, ``functions.NAME:INDEX``."""

    name: str
    only_at_start: bool = False

    begin = "<|tool_calls_section_begin|>"
    end = "<|tool_calls_section_end|>"
    call_begin = "<|tool_call_begin|>"
    call_end = "<|tool_call_end|>"
    separator = "<|tool_call_argument_begin|>"

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        parts = [
            f"{self.call_begin}functions.{name_of(call)}:{index}{self.separator}"
            f"{dumped(arguments_of(call))}{self.call_end}"
            for index, call in enumerate(calls)
        ]
        return self.begin + "".join(parts) + self.end

    def _call(self, text: str, at: int) -> tuple[Found, int] | None:
        head, sign, _ = text[at:].partition(self.separator)
        start = skip_space(text, at + len(head) + len(sign))
        end = json_end(text, start) if sign else None
        closed = None if end is None else after(text, end, self.call_end)
        if end is None or closed is None:
            return None
        name = head.strip().removeprefix("functions.").rpartition(":")[0] or head.strip()
        call = make_call(name, text[start:end], call_id=head.strip() or None)
        return checked(call, text[at:end]), closed


@dataclass(frozen=True)
class Blocks:
    """GLM-4: the answer is the name of a tool, a line break, and JSON; ``<|assistant|>`` opens
    further calls."""

    name: str
    only_at_start: bool = True
    markers: tuple[str, ...] = ("<|assistant|>",)
    opens: tuple[str, ...] = ("",)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return self.markers[0].join(
            f"{name_of(call)}\n{dumped(arguments_of(call))}" for call in calls
        )

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`: only the name of a declared tool opens a call."""
        start = skip_space(text, 0)
        if text.startswith(self.markers[0], start):
            start = skip_space(text, start + len(self.markers[0]))
        elif start < len(text) and self.markers[0].startswith(text[start:]):
            return None
        names = {name_of(tool) for tool in tools}
        head = _NAME.match(text, start)
        if head is None:
            return Section((), 0) if start < len(text) else None
        if head.end() == len(text):
            return None if any(name.startswith(head[0]) for name in names) else Section((), 0)
        if head[0] not in names:
            return Section((), 0)
        brace = skip_space(text, head.end())
        if "\n" not in text[head.end() : brace]:
            return None if brace == len(text) else Section((), 0)
        if brace < len(text) and text[brace] != "{":
            return Section((), 0)
        end = json_end(text, brace)
        if end is None:
            return None
        return Section((checked(make_call(head[0], text[brace:end]), text[:end]),), end)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: a name without JSON is text."""
        return Section((), 0) if "{" not in text else None
