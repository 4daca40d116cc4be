"""Redacts values before they leave the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Access tokens of hubs and services, and the user and password in an address."""
_NAMES = re.compile(r"(.*_)?(token|secret|password|api_?key)", re.IGNORECASE)
"""Keys whose values are secret."""


def shareable(value: Any) -> Any:
    """`value` with ``~`` for the home directory and without strings that look like access tokens,
    at every depth."""
    if isinstance(value, Mapping):
        return {
            key: "<token>" if item and _NAMES.fullmatch(str(key)) else shareable(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [shareable(item) for item in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    text = re.sub(re.escape(home) + r"(?=/|$)", "~", value) if len(home) > 1 else value
    return _SECRET.sub("<token>", text)
