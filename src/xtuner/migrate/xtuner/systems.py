"""System messages that old configs name: ``SYSTEM_TEMPLATE.coder``.

The text is in the old package, not in the config. If the config is inside that package (in
site-packages or a clone), its file is parsed for the text; otherwise the message has xtuner's own
wording, and the report says so.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from xtuner.migrate.report import Draft
from xtuner.migrate.values import Dotted
from xtuner.migrate.xtuner.names import names

_FILES = ("utils/templates.py", "xtuner/utils/templates.py")
_NAME = "SYSTEM_TEMPLATE"


def near(config: Path) -> dict[str, str]:
    """The system messages of the old package that contains `config`; empty if there is none."""
    folders = list(config.resolve().parents)[:6]
    for file in (folder / name for folder in folders for name in _FILES):
        if file.is_file():
            try:
                return _parsed(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue
    return {}


def message(name: str, line: int, draft: Draft) -> str:
    """The text of ``SYSTEM_TEMPLATE.<name>``; empty for an empty name."""
    if not name or name in draft.systems:
        return draft.systems.get(name, "")
    text = str(names("systems")[name])
    draft.note(
        line,
        f"{_NAME}.{name}",
        "has xtuner's own wording, since the text is in the old package and not in the config; "
        "to keep the old text, write it to SYSTEM",
    )
    return text


def text_of(value: Any, line: int, draft: Draft) -> str | None:
    """The text of a system message, given as text or as ``SYSTEM_TEMPLATE`` name, or None."""
    if value is None:
        return ""
    path = value.path if isinstance(value, Dotted) else value if isinstance(value, str) else None
    if path is None:
        return None
    _, found, name = path.rpartition(f"{_NAME}.")
    if found and (name in names("systems") or name in draft.systems):
        return message(name, line, draft)
    return value if isinstance(value, str) else None


def _parsed(text: str) -> dict[str, str]:
    """The texts in ``SYSTEM_TEMPLATE = ConfigDict(name=text, ...)``."""
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        if any(isinstance(target, ast.Name) and target.id == _NAME for target in node.targets):
            values = {k.arg: ast.literal_eval(k.value) for k in node.value.keywords if k.arg}
            return {name: value for name, value in values.items() if isinstance(value, str)}
    return {}
