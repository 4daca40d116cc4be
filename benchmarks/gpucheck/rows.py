"""Results of the parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Skip(Exception):
    """The part cannot run on this machine; the message says why."""


class Enough(BaseException):
    """Ends a run of `xtuner train` before it writes a checkpoint, which may take 20 GB."""


@dataclass(frozen=True)
class Row:
    """One result.

    Attributes:
        name: What was examined.
        values: The findings, by column name.
        passed: Whether the result is correct; None for information only.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    passed: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """The row as a dict for JSON."""
        return {"name": self.name, "passed": self.passed, **self.values}


def within(name: str, found: float, allowed: float, **more: Any) -> Row:
    """A row that passes if `found` is at most `allowed`; NaN does not pass."""
    values = {"found": found, "allowed": allowed, **more}
    return Row(name, values, passed=bool(found <= allowed))


def fact(name: str, value: Any) -> Row:
    """A row with information only."""
    return Row(name, {"value": value})
