"""What pages say, in English and Chinese: every string is a line of ``strings.toml``.

words = i18n.words("zh");  words("step_of", step=3, total=120)

The settings describe themselves in English; ``settings_zh.toml`` has their Chinese texts.
"""

from __future__ import annotations

import functools
import tomllib
from pathlib import Path

from xtuner.errors import count

LANGUAGES = ("en", "zh")


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """All strings by key, then by language."""
    text = Path(__file__).with_name("strings.toml").read_text(encoding="utf-8")
    return {
        key: dict(zip(LANGUAGES, row, strict=True))
        for section in tomllib.loads(text).values()
        for key, row in section.items()
    }


class _Number(int):
    """A number with the words for one or several things as its format."""

    def __format__(self, spec: str) -> str:
        return count(int(self), *spec.split("|")) if spec.strip(",") else format(int(self), spec)


class Words:
    """The strings of a language, English where it is unknown.

    Attributes:
        language: One of `LANGUAGES`.
    """

    def __init__(self, language: str) -> None:
        self.language = language if language in LANGUAGES else LANGUAGES[0]

    def __call__(self, key: str, **values: object) -> str:
        """The string `key`, with `values` in place of its ``{names}``; ``{rows:row}`` counts."""
        filled = {name: _Number(v) if type(v) is int else v for name, v in values.items()}
        return table()[key][self.language].format(**filled)

    def of_setting(self, section: str, english: str, *, key: str = "") -> str:
        """A text about settings.

        Args:
            section: 'parts', 'values' or 'settings' of the table.
            english: The text in English, which is the result if it has no translation.
            key: The key of the translation; the text itself if empty.
        """
        if self.language == "en":
            return english
        return settings_table()[section].get(key or english, english)


def words(language: str) -> Words:
    """The strings of `language`."""
    return Words(language)


@functools.cache
def settings_table() -> dict[str, dict[str, str]]:
    """The Chinese texts about settings, by section and key."""
    text = Path(__file__).with_name("settings_zh.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def preferred(accept_language: str) -> str:
    """The language of the HTTP header ``Accept-Language`` that is in the table, else English."""
    for part in accept_language.split(","):
        code = part.split(";")[0].strip().lower().split("-")[0]
        if code in LANGUAGES:
            return code
    return "en"
