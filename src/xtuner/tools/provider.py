"""The interface of tool providers, and the result of a call."""

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
    """The result of a call: its text, or the text of its error."""

    text: str
    failed: bool = False


class Provider(Protocol):
    """Provides tools and runs them."""

    @property
    def schemas(self) -> Sequence[Mapping[str, Any]]:
        """The tools."""
        ...

    def call(self, name: str, arguments: Mapping[str, Any], *, timeout: float) -> Result:
        """Run a tool; errors and time-outs are results."""
        ...

    def close(self) -> None:
        """Stop the processes of the tools."""
        ...


def as_text(value: Any) -> str:
    """A function's return value as text for the model."""
    if value is None:
        return "(no result)"
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        return str(value)
