"""The unchecked entries of a settings file, and the report of its problems.

Both readers (`python`, `yaml`) return a `Reading`: every setting with its line, and every problem
found. `check` adds its own problems, and `report` lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from xtuner.errors import count, listed

OVERRIDE = 0
"""The line of an entry that was given on the command line."""
BUILT_IN = -1
"""The line of an entry that comes from the tables of the built-in settings, or a dictionary."""
ARGUMENT = -2
"""The line of an entry that was given as a keyword argument."""
_MAX_SHOWN = 56
_MOST_SHOWN = 200


@dataclass(frozen=True)
class Entry:
    """One setting as given: its value and its line (or OVERRIDE, BUILT_IN, ARGUMENT)."""

    value: Any
    line: int

    @property
    def overrides(self) -> bool:
        """Whether it replaces what a file says."""
        return self.line in (OVERRIDE, ARGUMENT)

    def problem(self, name: str, message: str) -> Problem:
        """Make a problem about this entry, the setting `name`."""
        if self.line == OVERRIDE:
            return Problem(
                f"--set {name}={self.value if isinstance(self.value, str) else repr(self.value)}",
                message,
            )
        return Problem(f"{name} = {self.value!r}", message, line=max(self.line, 0))


@dataclass(frozen=True)
class Problem:
    """A problem: the source text it is about, the message, and the line (0: none)."""

    what: str
    message: str
    line: int = 0

    def sort_key(self) -> tuple[bool, int]:
        """Order by line; problems without one come last."""
        return (not self.line, self.line)


@dataclass
class Reading:
    """The result of a reader.

    Attributes:
        entries: The settings by name.
        broken: Names whose value could not be read; `problems` says why.
        problems: All problems.
        parsed: Whether the text follows the syntax; if not, nothing else is known.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    parsed: bool = True


def report(name: str, problems: Iterable[Problem]) -> str:
    """Format all problems of the settings `name`, one per line, aligned."""
    found = sorted(problems, key=Problem.sort_key)
    ordered = found[:_MOST_SHOWN]
    width = max(len(str(p.line)) for p in ordered)
    labels = [_label(p, width) for p in ordered]
    column = max(len(label) for label in labels)
    lines = [f"{label:<{column}}   {p.message}" for label, p in zip(labels, ordered, strict=True)]
    if len(found) > len(ordered):
        lines.append(f"... and {len(found) - len(ordered):,} more")
    return listed(f"{count(len(found), 'problem')} in {name}", lines)


def shortened(text: str) -> str:
    """Shorten `text` so that a message stays readable."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def parse_constant(text: str) -> bool | None:
    """Parse the spellings of True, False and None that are usual in shells and YAML.

    Raises:
        ValueError: `text` is none of them.
    """
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _label(problem: Problem, width: int) -> str:
    what = shortened(problem.what)
    return f"line {problem.line:<{width}}  {what}" if problem.line else what
