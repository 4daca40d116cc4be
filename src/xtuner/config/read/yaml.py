"""Read a settings file in YAML: plain values only, each key with its line, no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from xtuner.config.read import hints
from xtuner.config.read.arithmetic import RefusedError, check_size
from xtuner.config.read.entries import OVERRIDE, Entry, Problem, Reading

_MAX_DIGITS = 400
_TAGS = "tag:yaml.org,2002:"
_NUMBERS = (f"{_TAGS}int", f"{_TAGS}float")
_UNREADABLE = (ValueError, LookupError, AttributeError, OverflowError, TypeError, RecursionError)
"""Errors of PyYAML for tags whose value does not fit, such as ``!!int ""``."""


class NumberLoader(yaml.SafeLoader):
    """The safe loader, which also reads 1e-4 as a number."""


NumberLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


class _Loader(NumberLoader):
    """A loader without aliases, which reads None as null."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not supported; repeat the value", problem_mark=mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])


def read(text: str, *, overrides: Mapping[str, Any] | None = None) -> Reading:
    """Read the settings in `text`; `overrides` replace the file's values."""
    reading = Reading()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return Reading(problems=[_syntax_problem(text, error)], parsed=False)
    except RecursionError:
        return Reading(problems=[Problem("the file", "is nested too deeply")], parsed=False)
    except (ValueError, OverflowError) as error:  # an escape such as "\U00110000"
        return Reading(problems=[Problem("the file", f"is not YAML: {error}")], parsed=False)
    if node is None:
        return reading
    if not isinstance(node, yaml.MappingNode):
        hint = hints.yaml_lines_hint(text)
        reason = f"must consist of lines  key: value{f'; {hint}' if hint else ''}"
        return Reading(problems=[Problem("the file", reason)], parsed=False)
    for key, value in node.value:
        _read_pair(reading, key, value, overrides or {})
    return reading


def _read_pair(
    reading: Reading, key: yaml.Node, value: yaml.Node, overrides: Mapping[str, Any]
) -> None:
    line = key.start_mark.line + 1
    name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
    if name in reading.entries or name in reading.broken:
        first = reading.entries[name].line if name in reading.entries else None
        where = f" in line {first}" if first else ""
        reading.problems.append(
            Problem(f"{name}:", f"is already set{where}; keep one of the two", line=line)
        )
        return
    if name in overrides:
        reading.entries[name] = Entry(overrides[name], OVERRIDE)
        return
    if full_width := _chinese_quotes(value) or _full_width_colon(value):
        reading.problems.append(Problem(f"{name}:", full_width, line=line))
        reading.broken.add(name)
        return
    try:
        read_value = _construct(value)
        check_size(read_value)
    except (yaml.YAMLError, RefusedError, *_UNREADABLE) as error:
        reason = getattr(error, "problem", None) or str(error)
        if isinstance(error, LookupError | AttributeError | TypeError):
            reason = f"the value does not fit its tag {value.tag.replace(_TAGS, '!!')}"
        if "could not determine a constructor" in reason:
            reason = "a value that begins with ! is a tag in YAML; write quotes around it"
        reading.problems.append(Problem(f"{name}:", f"cannot be read: {reason}", line=line))
        reading.broken.add(name)
        return
    reading.entries[name] = Entry(read_value, line)


def _chinese_quotes(node: yaml.Node) -> str:
    """The problem of a value in quotes that YAML reads as letters; empty for others."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    scalars = [n for n in nodes if isinstance(n, yaml.ScalarNode) and n.style is None]
    if not any(n.value[:1] in hints.OPENING_QUOTES for n in scalars if n.value):
        return ""
    return "is in Chinese quotes, which would be part of the value; write ' or \""


def _full_width_colon(node: yaml.Node) -> str:
    """The problem of a dict whose keys contain the colon that should end them; empty for others."""
    keys = [key for key, value in node.value if not value.value] if _is_dict(node) else []
    if any(isinstance(key, yaml.ScalarNode) and "：" in key.value for key in keys):
        return "write ': ' instead of the full-width colon ："
    return ""


def _is_dict(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode)


def _construct(node: yaml.Node) -> Any:
    _refuse_odd_numbers(node)
    return _Loader("").construct_document(node)


def _refuse_odd_numbers(node: yaml.Node) -> None:
    """Raise for a number with many digits, which takes very long to parse, or in base 60."""
    waiting = [node]
    while waiting:
        item = waiting.pop()
        if isinstance(item, yaml.ScalarNode):
            if len(item.value) > _MAX_DIGITS and item.tag in _NUMBERS:
                raise RefusedError("is too large for a setting")
            if ":" in item.value and item.tag in _NUMBERS:
                raise RefusedError(
                    f"YAML takes {item.value!r:.40} for a number in base 60; write quotes around it"
                )
            if re.match(r"[-+]?0[\d_]", item.value) and item.tag == f"{_TAGS}int":
                raise RefusedError("YAML takes it for a number in base 8; write no leading zeros")
        elif isinstance(item, yaml.MappingNode):
            waiting += [part for pair in item.value for part in pair]
        else:
            waiting += item.value


def _syntax_problem(text: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return Problem("the file", f"is not YAML: {error}")
    context = getattr(error, "context", None) or ""
    opened = getattr(error, "context_mark", None)
    if opened is not None and any(word in context for word in ("scalar", "flow", "simple key")):
        mark = opened  # where the quote or bracket is, not where the file or next name shows it
    lines = text.split("\n")
    number = _line_without_colon(lines, mark.line)
    line = lines[number] if number < len(lines) else ""
    message = getattr(error, "problem", None) or ""
    hint = hints.yaml_hint(line, message, context)
    reason = f"is not YAML: {message}{f'; {hint}' if hint else ''}"
    return Problem(line.strip(), reason, line=number + 1)


def _line_without_colon(lines: list[str], number: int) -> int:
    """The line before line `number` (both from 0) if it has a full-width colon instead of its
    colon: YAML notices this one line later. Otherwise `number`."""
    before = lines[number - 1] if 0 < number <= len(lines) else ""
    return number - 1 if re.match(r"\s*\w+\s*：", before) else number
