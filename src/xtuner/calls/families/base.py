"""The interface of a family, and the parser that reads an answer as it streams.

pieces of text ──Parser.add──► Prose | Found, in order ──Parser.finish──► what was left open
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from xtuner.calls.read import CallFormatError, arguments_of, read_call
from xtuner.calls.scan import loads, skip_space

CUT_OFF = "is incomplete: it is malformed, or the answer reached max_new_tokens"


@dataclass(frozen=True)
class Prose:
    """Text that is not part of a call."""

    text: str


@dataclass(frozen=True)
class Found:
    """A call, or text that should have been one.

    Attributes:
        call: The call; None if there is none.
        text: The text of the section as written.
        problem: Why it is not a call; empty if it is one.
    """

    call: Mapping[str, Any] | None
    text: str
    problem: str = ""


Event = Prose | Found


@dataclass(frozen=True)
class Section:
    """A complete section of calls: what was found, and the index after it."""

    found: tuple[Found, ...]
    end: int


class Family(Protocol):
    """How one family of models writes calls.

    Attributes:
        name: Its row in the table.
        opens: Strings that open a section of calls.
        markers: Strings that are tokens of their own; special tokens among them are kept when an
            answer is decoded.
        only_at_start: A section can begin only where the answer does.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def opens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def markers(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def only_at_start(self) -> bool: ...  # noqa: D102

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """The calls as the model writes them, without the stop."""
        ...

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """Read the section that `text` begins with.

        Returns:
            None while it is incomplete; a section that ends at 0 if it turns out not to be one.
        """
        ...

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """Read a section at the end of the text; None if it is cut off."""
        ...


class Parser:
    """Separates the calls of an answer from its text while it streams.

    Text that may open a section is held back until this is decided.

    Args:
        family: How the model writes calls.
        tools: The tools of the conversation; some families need them to recognize types and names.
    """

    def __init__(self, family: Family, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._family, self._tools = family, tools
        self._held, self._begun = "", False

    def add(self, piece: str) -> list[Event]:
        """What `piece` completes."""
        self._held += piece
        events: list[Event] = []
        while self._held:
            start = self._section_start()
            if start > 0:
                events.append(self._release(start))
                continue
            if start < 0 or not self._opened():
                break
            section = self._family.read(self._held, self._tools)
            if section is None:
                break
            self._take(section, events)
        return events

    def finish(self) -> list[Event]:
        """What is left at the end of the answer."""
        events: list[Event] = []
        while self._held:
            start = self._section_start()
            if start != 0 or not self._opened():
                events.append(self._release(start if start > 0 else len(self._held)))
                continue
            read, ended = self._family.read, self._family.ended
            section = read(self._held, self._tools) or ended(self._held, self._tools)
            if section is None:
                events.append(Found(None, self._held, CUT_OFF))
                self._held = ""
            else:
                self._take(section, events)
        return events

    def _take(self, section: Section, events: list[Event]) -> None:
        if not section.end:
            events.append(self._release(1))
            return
        events.extend(section.found)
        self._begun = True
        self._held = self._held[section.end :]
        if self._family.only_at_start:
            self._begun = False
        self._held = self._held.lstrip("\n") if not self._held.strip() else self._held

    def _release(self, count: int) -> Prose:
        text, self._held = self._held[:count], self._held[count:]
        self._begun = self._begun or bool(text.strip())
        return Prose(text)

    def _opened(self) -> bool:
        """Whether the held text begins with a complete opening."""
        held = self._held.lstrip() if self._family.only_at_start else self._held
        return any(held.startswith(word) for word in self._family.opens)

    def _section_start(self) -> int:
        """Where a section begins or may begin; -1 if everything can be released later.

        The text before it can be released now.
        """
        if self._family.only_at_start:
            return self._start_of_answer()
        found = [at for word in self._family.opens if (at := self._held.find(word)) >= 0]
        if found:
            return min(found)
        longest = max(map(len, self._family.opens))
        for size in range(min(longest - 1, len(self._held)), 0, -1):
            if any(word.startswith(self._held[-size:]) for word in self._family.opens):
                at = len(self._held) - size
                return at or -1
        return len(self._held)

    def _start_of_answer(self) -> int:
        if self._begun:
            return len(self._held)
        held = self._held.lstrip()
        if not held:
            return -1
        if any(held.startswith(word) for word in self._family.opens):
            return 0
        if any(word.startswith(held) for word in self._family.opens):
            return -1
        return len(self._held)


def parse(
    family: Family, text: str, *, tools: Sequence[Mapping[str, Any]] = ()
) -> tuple[str, list[Found]]:
    """The text and the calls of a complete answer."""
    parser = Parser(family, tools)
    events = [*parser.add(text), *parser.finish()]
    plain = "".join(event.text for event in events if isinstance(event, Prose))
    return plain, [event for event in events if isinstance(event, Found)]


def as_found(value: Any, text: str) -> Found:
    """A parsed JSON value as a call, or why it is not one."""
    try:
        call = read_call(value)
    except CallFormatError as error:
        return Found(None, text, str(error))
    return checked(call, text)


def checked(call: Mapping[str, Any], text: str) -> Found:
    """`call`, whose arguments must be an object."""
    arguments = arguments_of(call)
    if isinstance(arguments, str):
        return Found(None, text, "has arguments that are not valid JSON")
    if not isinstance(arguments, Mapping):
        return Found(None, text, "has arguments that are not an object")
    return Found(call, text)


def read_json(text: str) -> tuple[Found, ...]:
    """The call, or the list of calls, that `text` is as JSON."""
    try:
        value = loads(text)
    except ValueError as error:
        reason = str(error).partition(":")[0]
        return (Found(None, text, f"is not valid JSON ({reason})"),)
    values = value if isinstance(value, list) else [value]
    return tuple(as_found(item, text) for item in values)


def after(text: str, at: int, closing: str) -> int | None:
    """Index after white space and `closing`; `at` if something else follows; None if undecided."""
    if not closing:
        return at
    start = skip_space(text, at)
    if text.startswith(closing, start):
        return start + len(closing)
    return None if closing.startswith(text[start:]) else at
