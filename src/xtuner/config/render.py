"""Write settings as a commented file in parts, which reads back to the same settings."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from xtuner import plugins
from xtuner.config.combinations import ALGORITHMS
from xtuner.config.describe import is_dict, takes_one
from xtuner.config.marks import thawed
from xtuner.config.schema import ALIASES, Settings, field_parts

_WIDTH = 100
_COMMENT_COLUMN = 40


def render(values: Mapping[str, Any], *, title: str, kind: type[Settings] = Settings) -> str:
    """Write `values` as a settings file with the settings that users often change.

    Args:
        values: Settings by name; absent ones have their defaults.
        title: The docstring of the file.
        kind: The class of settings.
    """
    fields = kind.model_fields
    given = kind.model_construct(**values)
    unit = {"micro_batches": "micro-batches"}.get(given.steps_are, "steps")
    marks = {name: kind.mark(name).comment for name in fields}
    comments = {n: c.replace("{steps}", unit) for n, c in marks.items() if c is not None}
    left_out = {*given.idle(), *_uncommon(given.algorithm)}
    shown = {name: fields[name].default for name in comments if name not in left_out}
    changed = {
        name: value
        for name, value in values.items()
        if name in comments or not _same(value, fields[name].default)
    }
    names = {name: alias for alias, name in ALIASES.items()} if given.has_vision else {}
    return _file({**shown, **changed}, comments=comments, title=title, kind=kind, names=names)


def _uncommon(algorithm: str) -> tuple[str, ...]:
    """Settings that the algorithm leaves out of a copied file."""
    if algorithm not in plugins.names(ALGORITHMS):
        return ()
    module = plugins.load(ALGORITHMS, algorithm, setting="algorithm")
    names: tuple[str, ...] = module.Algorithm.uncommon
    return names


def render_all(settings: Settings, *, title: str) -> str:
    """Write all settings without comments: the record of a run."""
    return _file(settings.model_dump(), comments={}, title=title, kind=type(settings))


def literal(name: str, value: Any, kind: type[Settings] = Settings) -> str:
    """Format the value of setting `name` on one line."""
    if is_dict(name, kind):
        return repr(thawed(value) or {})
    if takes_one(name, kind) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    return _literal(value)


def _file(
    values: Mapping[str, Any],
    *,
    comments: Mapping[str, str],
    title: str,
    kind: type[Settings],
    names: Mapping[str, str] | None = None,
) -> str:
    """`names`: other names to write settings under."""
    sections = [_docstring(title)]
    parts = field_parts(kind)
    for part in kind.parts():
        own = [name for name in part.model_fields if name in values and parts[name] is part]
        if own:
            lines = [
                _assignment(
                    (names or {}).get(n, n),
                    literal(n, values[n], kind),
                    values[n],
                    comment=comments.get(n, ""),
                )
                for n in own
            ]
            sections.append("\n".join([*_heading(part.__doc__ or ""), *lines]))
    return "\n\n".join(sections) + "\n"


def _heading(text: str) -> list[str]:
    rule = "#" * 70
    return [rule, f"# {text.strip()}", rule]


def _docstring(text: str) -> str:
    # A quote or a backslash in a name must not end the docstring.
    safe = text.replace("\\", "/").replace('"""', "'''")
    return f'"""{safe}"""' if "\n" not in safe else f'"""{safe}\n"""'


def _assignment(name: str, text: str, value: Any, *, comment: str) -> str:
    line = f"{name} = {text}"
    if len(line) > _WIDTH and not (isinstance(value, str) and value.split() == [value]):
        line = f"{name} = {_long(value)}"
        return f"# {comment}\n{line}" if comment else line
    if not comment:
        return line
    commented = f"{line:<{_COMMENT_COLUMN}}  # {comment}"
    return commented if len(commented) <= _WIDTH else f"# {comment}\n{line}"


def _literal(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        items = [_literal(item) for item in value]
        if len(items) == 2 and all(isinstance(item, float) for item in value):
            return f"({', '.join(items)})"
        return f"[{', '.join(items)}]"
    return repr(value)


def _long(value: Any) -> str:
    """Format a value over several lines: a list with one item per line, a string in pieces."""
    if isinstance(value, str):
        return f"(\n{_indented(_pieces(value))}\n)"
    return f"[\n{_indented(_items(value))}\n]"


def _items(values: Iterable[Any]) -> list[str]:
    lines: list[str] = []
    for value in values:
        *before, last = _pieces(value) if isinstance(value, str) else [_literal(value)]
        lines += [*before, f"{last},"]
    return lines


def _pieces(text: str) -> list[str]:
    parts = re.findall(rf".{{1,{_WIDTH - 20}}}(?:\s|$)|.{{1,{_WIDTH - 20}}}", text, flags=re.DOTALL)
    return [_text(part) for part in parts] or [_text(text)]


def _indented(lines: list[str]) -> str:
    return textwrap.indent("\n".join(lines), "    ")


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if "'" in text and '"' not in text else repr(text)


def _number(value: float) -> str:
    """The shortest form that reads back as `value`; 2e-4 rather than 0.0002."""
    if not 0 < abs(value) < 1e-2:
        return repr(value)
    for digits in range(17):
        mantissa, exponent = f"{value:.{digits}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
        if float(text) == value:
            return text
    return repr(value)


def _same(left: Any, right: Any) -> bool:
    """Whether two values of a setting are equal, with lists and tuples treated alike."""
    as_list = [list(v) if isinstance(v, list | tuple) else v for v in (left, right)]
    return bool(as_list[0] == as_list[1])
