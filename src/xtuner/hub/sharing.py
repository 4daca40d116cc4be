"""Redacts values before they leave the machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xtuner.hub import fetch

_SECRET = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{16})|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
"""Access tokens of hubs and services, and the user and password in an address."""
_NAMES = re.compile(r"(.*_)?(token|secret|password|api_?key)", re.IGNORECASE)
"""Keys whose values are secret."""
_BEFORE = r"(?:(?<![\w.~/-])|(?<=://)|(?<=\\n))"
"""The home directory is not in the middle of a path; it may follow ``file://``."""


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
    path = _BEFORE + re.escape(home) + r"(?![\w.-])"
    text = re.sub(path, "~", value) if len(home) > 1 else value
    return _SECRET.sub("<token>", text)


def shareable_command(*words: object) -> str:
    """A command for the user to copy, with ``~`` for the home directory where a shell expands it:
    at the beginning of a word, before the quotes."""
    return " ".join(map(_shareable_word, map(str, words)))


def _shareable_word(word: str) -> str:
    shown = str(shareable(word))
    if shown == word or not re.match("~(/|$)", shown):
        return shlex.quote(shown)
    return "~/" + shlex.quote(shown[2:]) if shown[2:] else shown


def public_name(base: str) -> str:
    """The hub name of a base model that is a local folder: a fetched model's own name, otherwise
    the folder's name."""
    folder = Path(base).expanduser()
    if not folder.is_absolute():
        return base
    return fetch.hub_name_of(folder) or folder.name


def last_parts(value: Any) -> Any:
    """The last part of a path, so that local folders stay private."""
    if isinstance(value, list | tuple):
        return [last_parts(item) for item in value]
    local = isinstance(value, str) and value.startswith(("/", "~/"))
    return Path(value).name if local else value
