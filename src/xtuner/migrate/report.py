"""What becomes of an old config: settings, and what of it is lost, noted or in the way."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from xtuner.config.read.entries import Entry, Problem, Reading, shortened
from xtuner.config.render import render
from xtuner.migrate.values import UnreadError, written

_WIDTH = 96


@dataclass(frozen=True)
class Item:
    """Something of the old config that needs a word: its line, what stands there, and the word."""

    line: int
    what: str
    why: str

    def __str__(self) -> str:
        where = f"line {self.line}, " if self.line else ""
        return f"{where}{self.what}: {self.why}"


@dataclass
class Draft:
    """The settings file in the making.

    Attributes:
        origin: what wrote configs of this form, such as 'XTuner 0.x'.
        kind: what the config trains, such as 'sft qlora'.
        values: our settings by name.
        lines: for each of them the line that it comes from.
        lost: what has no counterpart here; the training is the same without it, or nearly.
        notes: what is done another way here.
        refused: why the meaning would not be kept.
        not_yet: why this version cannot do it at all, by name.
        files: texts of further files that go beside the settings file, by the end of their name.
    """

    origin: str
    kind: str = ""
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    lost: list[Item] = field(default_factory=list)
    notes: list[Item] = field(default_factory=list)
    refused: list[Item] = field(default_factory=list)
    not_yet: list[Item] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, line: int) -> None:
        """Give our setting `name` the value that the old `line` means."""
        self.values[name] = value
        self.lines[name] = line

    def lose(self, line: int, what: str, why: str) -> None:
        """List something that is not carried."""
        self._add(self.lost, line, what, why)

    def note(self, line: int, what: str, why: str) -> None:
        """List something that is done another way."""
        self._add(self.notes, line, what, why)

    def refuse(self, line: int, what: str, why: str) -> None:
        """List something without which the meaning would change."""
        self._add(self.refused, line, what, why)

    def postpone(self, line: int, what: str, why: str) -> None:
        """List something that is not part of this version."""
        self._add(self.not_yet, line, what, why)

    def refuse_unread(self, error: UnreadError) -> None:
        """List a value that only running the file would give."""
        value = error.value
        self.refuse(value.line, value.text, f"{value.why}; write the value in its place")

    def _add(self, items: list[Item], line: int, what: str, why: str) -> None:
        item = Item(line, shortened(what), why)
        if item not in items:
            items.append(item)

    @property
    def outcome(self) -> str:
        """'migrated', 'with losses', 'refused' or 'not yet'."""
        if self.not_yet:
            return "not yet"
        if self.refused:
            return "refused"
        return "with losses" if self.lost else "migrated"

    def reading(self) -> Reading:
        """The settings in the form that `xtuner.config.check` takes."""
        return Reading(
            {name: Entry(value, self.lines.get(name, 0)) for name, value in self.values.items()}
        )

    def take_problems(self, problems: list[Problem]) -> None:
        """Refuse what the schema refuses, by the lines of the old config."""
        for problem in problems:
            self.refuse(problem.line, problem.what, problem.message)

    def text(self, *, source: str, command: str) -> str:
        """The settings file.

        Args:
            source: the old file, for the head of the new one.
            command: how to train it.
        """
        head = [f"Migrated from {source} ({self.origin}, {self.kind}).", "", f"    {command}"]
        for title, items in (("Not carried:", self.lost), ("Done another way:", self.notes)):
            if items:
                head += ["", title]
                head += [line for item in ordered(items) for line in wrapped(str(item))]
        return render(self.values, title="\n".join(head))

    def report(self) -> Iterator[str]:
        """Lines for the terminal."""
        for title, items in (("Not carried", self.lost), ("Done another way here", self.notes)):
            if items:
                yield f"{title} ({len(items)}):"
                yield from (line for item in ordered(items) for line in wrapped(str(item)))

    def reasons(self) -> Iterator[str]:
        """Why there is no settings file."""
        for item in ordered([*self.not_yet, *self.refused]):
            yield str(item)


def ordered(items: list[Item]) -> list[Item]:
    """By line; what has none comes last."""
    return sorted(items, key=lambda item: (not item.line, item.line))


def wrapped(text: str) -> list[str]:
    """One item of a list in lines that fit a terminal."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def shown(key: str, value: Any) -> str:
    """``key = value`` as the old config has it."""
    return f"{key} = {written(value)}"
