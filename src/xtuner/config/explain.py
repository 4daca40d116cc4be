"""Explain the settings from the schema: one, all in a table, or as the reference page.

``python -m xtuner.config.explain > docs/settings.md`` writes the page.
"""

from __future__ import annotations

import textwrap

from xtuner.config.check import named_parts, unknown_setting
from xtuner.config.describe import allowed
from xtuner.config.parts import Part
from xtuner.config.render import literal
from xtuner.config.schema import ALIASES, Settings, field_parts
from xtuner.errors import ConfigError

_WIDTH = 100
_PAGE_HEAD = """\
# Settings

<!-- Made by `python -m xtuner.config.explain > docs/settings.md`; do not edit. -->

A settings file assigns these names, in Python or YAML syntax. What it leaves out has its default.
`xtuner explain NAME` shows one of them, `--set NAME=VALUE` overrides one on the command line.
"""


def explain(name: str, kind: type[Settings] = Settings) -> str:
    """Explain setting `name`.

    Raises:
        ConfigError: there is no such setting.
    """
    parts = field_parts(kind)
    name = ALIASES.get(name, name)
    if name not in parts:
        raise ConfigError(f"{name}: {unknown_setting(name)}")
    words = named_parts(name)
    lines = [
        name,
        f"  takes    {allowed(name, kind)}",
        f"  default  {_default(name, kind)}",
        f"  in       {parts[name].__doc__}",
        *([_wrapped("  names    ", ", ".join(words))] if words else []),
        "",
        _wrapped("  ", _meaning(name, kind)),
    ]
    return "\n".join(lines)


def table() -> str:
    """List all settings by part, with their defaults and the first sentence of their meaning."""
    sections = []
    for part in Settings.parts():
        rows = [(name, _default(name), _first_sentence(name)) for name in part.model_fields]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [
            _cut(f"  {name:<{widths[0]}}  {default:<{widths[1]}}  {meaning}")
            for name, default, meaning in rows
        ]
        sections.append("\n".join([str(part.__doc__), *lines]))
    return "\n\n".join(sections)


def page() -> str:
    """The reference page of all settings, in Markdown."""
    sections = [_PAGE_HEAD]
    for part in Settings.parts():
        sections.append(f"## {_title(part)}\n")
        sections += [
            f"### `{name}`\n\n{_meaning(name)}\n\n"
            f"Takes {allowed(name)}. Default: {_default_in_page(name)}.\n"
            for name in part.model_fields
        ]
    return "\n".join(sections)


def _title(part: type[Part]) -> str:
    number, text = str(part.__doc__).split("  ")
    return f"{number.capitalize()}: {text}"


def _meaning(name: str, kind: type[Settings] = Settings) -> str:
    return " ".join((kind.model_fields[name].description or "").split())


def _first_sentence(name: str) -> str:
    return _meaning(name).split(". ")[0].split(": ")[0].rstrip(".")


def _default(name: str, kind: type[Settings] = Settings) -> str:
    field = kind.model_fields[name]
    return "must be set" if field.is_required() else literal(name, field.default, kind)


def _default_in_page(name: str) -> str:
    required = Settings.model_fields[name].is_required()
    return "none, it must be set" if required else f"`{_default(name)}`"


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 3].rstrip() + "..."


def _wrapped(label: str, text: str) -> str:
    indent = " " * len(label)
    return textwrap.fill(text, _WIDTH, initial_indent=label, subsequent_indent=indent)


if __name__ == "__main__":
    print(page(), end="")
