"""Failed rows, and rows that are kept despite a fault, grouped by reason."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from xtuner.data.sources.rows import Fault

_MAX_REASONS = 100
KEPT_FAULTS = 20
"""Number of rows per reason that are stored with their line; all are counted."""


@dataclass(frozen=True)
class BadRow:
    """A failed row: the number of its file, its line, and the fault."""

    file: int
    line: int
    fault: Fault


@dataclass
class FaultGroup:
    """All rows that failed for one reason: a common description, and the first of them."""

    what: str
    count: int = 0
    first: list[BadRow] = field(default_factory=list)

    def add(self, row: BadRow) -> None:
        """Count `row`; its fault differs from the others only in quoted words and list indices."""
        self.count += 1
        if len(self.first) < KEPT_FAULTS:
            self.first.append(row)
        if _outline(self.what) == _outline(row.fault.words):
            parts = zip(*map(_VARIABLE.split, (self.what, row.fault.words)), strict=True)
            self.what = "".join(a if a == b else _blank(a) for a, b in parts)

    @classmethod
    def from_dict(cls, group: Mapping[str, Any]) -> FaultGroup:
        """From what `asdict` made of a group."""
        rows = [BadRow(r["file"], r["line"], Fault(**r["fault"])) for r in group["first"]]
        return cls(group["what"], group["count"], rows)


_VARIABLE = re.compile(r"('[^']*'|\[\d*\])")


def _outline(words: str) -> str:
    """The part of a description that rows with the same fault have in common."""
    return _VARIABLE.sub("?", words)


def _blank(part: str) -> str:
    return "[]" if part.startswith("[") else "'...'"


def add_to_group(groups: dict[str, FaultGroup], row: BadRow) -> None:
    """Add `row` to the group of its reason."""
    key = _outline(row.fault.words)
    if key not in groups and len(groups) >= _MAX_REASONS:
        key = "has another fault"
        groups.setdefault(key, FaultGroup(key))
    groups.setdefault(key, FaultGroup(row.fault.words)).add(row)


def by_count(groups: Mapping[str, FaultGroup]) -> list[dict[str, Any]]:
    """The groups as dicts, the largest first."""
    return [asdict(g) for g in sorted(groups.values(), key=lambda group: -group.count)]
