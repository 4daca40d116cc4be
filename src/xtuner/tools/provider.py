"""What has tools and runs them, and what a call gives."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BUILTIN = "xtuner.tools.builtin"
"""The package of the built-in tools."""
ALIAS = re.compile(r"^([A-Za-z_]\w*)=")
"""Another name for a built-in tool."""


@dataclass(frozen=True)
class Result:
    """What a call gave: its text, or the text of its error."""

    text: str
    failed: bool = False


class Provider(Protocol):
    """Something that has tools and runs them."""

    @property
    def schemas(self) -> Sequence[Mapping[str, Any]]:
        """The tools."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any], *, timeout: float) -> Result:
        """Run a tool; errors and time-outs are results."""
        ...

    def close(self) -> None:
        """End what runs."""
        ...


def as_text(value: Any) -> str:
    """A function's value as the text that a model reads."""
    if value is None:
        return "(no result)"
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)
