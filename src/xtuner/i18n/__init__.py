"""What pages say, in English and Chinese: every string is a line of ``strings.toml``.

words = i18n.words("zh");  words("report_steps", count=120)
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from pathlib import Path

LANGUAGES = ("en", "zh")

Words = Callable[..., str]
"""From the key of a string, and the values of its ``{names}``, to the string."""


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """All strings by key, then by language."""
    text = Path(__file__).with_name("strings.toml").read_text(encoding="utf-8")
    return {
        key: dict(zip(LANGUAGES, row, strict=True))
        for section in tomllib.loads(text).values()
        for key, row in section.items()
    }


def words(language: str) -> Words:
    """The function that gives strings in `language`; English where the language is unknown."""
    chosen = language if language in LANGUAGES else "en"

    def say(key: str, **values: object) -> str:
        return table()[key][chosen].format(**values)

    return say


def preferred(accept_language: str) -> str:
    """The language of the HTTP header ``Accept-Language`` that is in the table, else English."""
    for part in accept_language.split(","):
        code = part.split(";")[0].strip().lower().split("-")[0]
        if code in LANGUAGES:
            return code
    return "en"
