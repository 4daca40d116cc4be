"""The result of reading an old config: settings, and a report of what is lost or changed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from xtuner.config.read.entries import Entry, Problem, Reading, shortened
from xtuner.config.render import render
from xtuner.migrate.values import Table, UnreadError, written

_WIDTH = 96


@dataclass(frozen=True)
class Item:
    """An entry of the report: a line of the old config, what it says, and the explanation."""

    line: int
    what: str
    why: str

    def __str__(self) -> str:
        where = f"line {self.line}, " if self.line else ""
        return f"{where}{self.what}: {self.why}"


@dataclass
class Draft:
    """A settings file under construction.

    Attributes:
        origin: The trainer that the config is for, such as 'XTuner 0.x'.
        kind: What the config trains, such as 'sft qlora'.
        values: Settings by name.
        lines: The line of the old config for each setting.
        lost: What has no counterpart; training is the same without it, or nearly so.
        notes: What works differently in xtuner.
        refused: What cannot be translated faithfully.
        not_yet: What this version of xtuner does not support.
        files: Contents of accompanying files, by the suffix of their name.
        systems: Texts of system messages in the old package, by name.
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
    systems: Mapping[str, str] = field(default_factory=dict)

    def set(self, name: str, value: Any, line: int) -> None:
        """Set the setting `name`, which comes from `line` of the old config."""
        self.values[name] = value
        self.lines[name] = line

    def carry(self, table: Table, key: str, ours: str, default: Any = None) -> None:
        """Set `ours` to the value of `key`, or to `default`; without either, set nothing."""
        value = table.take(key, default)
        if value or default is not None:
            self.set(ours, value, table.line_of(key))

    def lose(self, line: int, what: str, why: str) -> None:
        """Report something that is dropped."""
        self._add(self.lost, line, what, why)

    def note(self, line: int, what: str, why: str) -> None:
        """Report something that works differently."""
        self._add(self.notes, line, what, why)

    def refuse(self, line: int, what: str, why: str) -> None:
        """Report something that cannot be translated faithfully."""
        self._add(self.refused, line, what, why)

    def postpone(self, line: int, what: str, why: str) -> None:
        """Report something that this version does not support."""
        self._add(self.not_yet, line, what, why)

    def refuse_unread(self, error: UnreadError) -> None:
        """Report a value that is known only after executing the file."""
        value = error.value
        self.refuse(value.line, value.text, f"{value.why}; write the value itself")

    def _add(self, items: list[Item], line: int, what: str, why: str) -> None:
        item = Item(line, shortened(what), why)
        if item not in items:
            items.append(item)

    @property
    def outcome(self) -> str:
        """'migrated', 'with losses', 'refused' or 'not yet'."""
        if self.not_yet or self.refused:
            return "not yet" if self.not_yet else "refused"
        return "with losses" if self.lost else "migrated"

    def reading(self) -> Reading:
        """The settings as input for `xtuner.config.check`."""
        return Reading(
            {name: Entry(value, self.lines.get(name, 0)) for name, value in self.values.items()}
        )

    def take_problems(self, problems: list[Problem]) -> None:
        """Report the problems that the schema finds, with the lines of the old config."""
        for problem in problems:
            self.refuse(problem.line, problem.what, problem.message)

    def text(self, *, source: str, command: str) -> str:
        """The text of the settings file.

        Args:
            source: Name of the old file, for the header.
            command: The training command, for the header.
        """
        head = [f"Migrated from {source} ({self.origin}, {self.kind}).", "", f"    {command}"]
        for title, items in (("Dropped:", self.lost), ("Different in xtuner:", self.notes)):
            if items:
                head += ["", title]
                head += [line for item in ordered(items) for line in wrapped(str(item))]
        return render(self.values, title="\n".join(head))

    def report(self) -> Iterator[str]:
        """Lines for the console."""
        for title, items in (("Dropped", self.lost), ("Different in xtuner", self.notes)):
            if items:
                yield f"{title} ({len(items)}):"
                yield from (line for item in ordered(items) for line in wrapped(str(item)))

    def reasons(self) -> Iterator[str]:
        """Why there is no settings file."""
        for item in ordered([*self.not_yet, *self.refused]):
            yield str(item)


def ordered(items: list[Item]) -> list[Item]:
    """Sort by line; items without a line come last."""
    return sorted(items, key=lambda item: (not item.line, item.line))


def wrapped(text: str) -> list[str]:
    """Wrap a list item to the width of the console."""
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )


def shown(key: str, value: Any) -> str:
    """``key = value`` as written in the old config."""
    return f"{key} = {written(value)}"
