"""Calls whose arguments have their own tags: Qwen3-Coder, GLM-4.5, DeepSeek-V3.2."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section, after, checked
from xtuner.calls.families.json_text import dumped
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import json_end, loads, skip_space

_PYTHON = {"True": True, "False": False, "None": None}
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\n?(.*?)\n?</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_PAIR = re.compile(
    r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL
)  # fmt: skip


def as_text(value: Any) -> str:
    """A value between tags: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else dumped(value)


def from_text(text: str, schema: Mapping[str, Any] | None) -> Any:
    """The value of an argument, by its type in the schema; without one, JSON that is not a string.

    Qwen's templates write the constants of a declared type as Python does.
    """
    declared = (schema or {}).get("type")
    if declared in ("string", ["string"]):
        return text
    if declared and text in _PYTHON:
        return _PYTHON[text]
    try:
        return loads(text)
    except ValueError:
        return text


def schema_of(name: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The properties of the tool `name`; empty if it is not declared."""
    for tool in tools:
        if name_of(tool) == name:
            properties = tool["function"].get("parameters", {}).get("properties", {})
            return properties if isinstance(properties, Mapping) else {}
    return {}


@dataclass(frozen=True)
class _Tagged:
    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = (OPEN,)
    markers: tuple[str, ...] = (OPEN, CLOSE)

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return "\n".join(self._one(call) for call in calls)

    def _one(self, call: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`."""
        return None


@dataclass(frozen=True)
class NamedTag(_Tagged):
    """``<function=NAME>{...}</function>``."""

    opens: tuple[str, ...] = ("<function=",)
    markers: tuple[str, ...] = ("</function>",)

    def _one(self, call: Mapping[str, Any]) -> str:
        return f"<function={name_of(call)}>{dumped(arguments_of(call))}</function>"

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        close = text.find(">")
        start = skip_space(text, close + 1)
        if close < 0 or start == len(text):
            return None
        end = json_end(text, start) if text[start] == "{" else None
        if end is None:
            return None if text[start] == "{" else Section((), 0)
        stop = after(text, end, self.markers[0])
        if stop is None:
            return None
        name = text[len(self.opens[0]) : close].strip()
        return Section((checked(make_call(name, text[start:end]), text[:end]),), stop)


class QwenXml(_Tagged):
    """``<function=NAME>`` with a ``<parameter=NAME>`` per argument, between two `markers`."""

    last = "</function>"

    def _one(self, call: Mapping[str, Any]) -> str:
        parts = [
            f"<parameter={name}>\n{as_text(value)}\n</parameter>\n"
            for name, value in arguments_of(call).items()
        ]
        begin, close = self.markers
        return f"{begin}\n<function={name_of(call)}>\n{''.join(parts)}</function>\n{close}"

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        inner = _inner(text, self.markers, self.last)
        if inner is None:
            return None
        return Section((self._call(inner, tools),), len(inner) + sum(map(len, self.markers)))

    def _call(self, inner: str, tools: Sequence[Mapping[str, Any]]) -> Found:
        match = _FUNCTION.fullmatch(inner)
        if match is None:
            return Found(None, inner, "does not have the form <function=NAME>...</function>")
        name = match[1].strip()
        properties = schema_of(name, tools)
        pairs = _PARAMETER.findall(f"{match[2]}\n")
        arguments = {key: from_text(value, properties.get(key)) for key, value in pairs}
        return Found(make_call(name, arguments), inner)


@dataclass(frozen=True)
class InvokeXml(_Tagged):
    """``<invoke name="NAME">`` with a ``<parameter name="NAME">`` per argument; all calls are
    between two `markers`.

    Attributes:
        prefix: Prefix of the tag names.
        typed: Whether parameters declare if their value is a string.
    """

    prefix: str = ""
    typed: bool = False

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        begin, close = self.markers
        return f"{begin}\n{''.join(self._one(call) for call in calls)}{close}"

    def _one(self, call: Mapping[str, Any]) -> str:
        parameters = [
            f'<{self.prefix}parameter name="{name}"{self._type_of(value)}>{as_text(value)}'
            f"</{self.prefix}parameter>\n"
            for name, value in arguments_of(call).items()
        ]
        head = f'<{self.prefix}invoke name="{name_of(call)}">\n'
        return f"{head}{''.join(parameters)}</{self.prefix}invoke>\n"

    def _type_of(self, value: Any) -> str:
        return f' string="{str(isinstance(value, str)).lower()}"' if self.typed else ""

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        inner = _inner(text, self.markers, f"</{self.prefix}invoke>")
        if inner is None:
            return None
        end = len(inner) + sum(map(len, self.markers))
        tag = re.escape(self.prefix)
        calls = re.findall(
            rf'<{tag}invoke name="([^"\n]+)">(.*?)</{tag}invoke>', inner, flags=re.DOTALL
        )
        if not calls:
            problem = f'does not have the form <{self.prefix}invoke name="NAME">...'
            return Section((Found(None, inner, problem),), end)
        return Section(tuple(self._call(name, body, tools) for name, body in calls), end)

    def _call(self, name: str, body: str, tools: Sequence[Mapping[str, Any]]) -> Found:
        tag, properties = re.escape(self.prefix), schema_of(name, tools)
        arguments = {}
        for key, kind, value in re.findall(
            rf'<{tag}parameter name="([^"\n]+)"(?: string="(true|false)")?>(.*?)</{tag}parameter>',
            body,
            flags=re.DOTALL,
        ):
            schema = {"type": "string"} if kind == "true" else properties.get(key)
            arguments[key] = from_text(value, None if kind == "false" else schema)
        return Found(make_call(name, arguments), body)


def _inner(text: str, markers: Sequence[str], last: str) -> str | None:
    """The text between the markers in `text`, which begins with the first; None if cut off.

    A value may hold the closing marker: the section ends with the marker after `last`.
    """
    begin, close = markers
    end = text.find(close, len(begin))
    while end >= 0:
        inner = text[len(begin) : end]
        if inner.rstrip().endswith(last) or last not in inner:
            return inner
        end = text.find(close, end + 1)
    return None


class GlmXml(_Tagged):
    """The name, then an ``<arg_key>`` and an ``<arg_value>`` per argument."""

    def _one(self, call: Mapping[str, Any]) -> str:
        pairs = [
            f"<arg_key>{name}</arg_key>\n<arg_value>{as_text(value)}</arg_value>\n"
            for name, value in arguments_of(call).items()
        ]
        return f"{OPEN}{name_of(call)}\n{''.join(pairs)}{CLOSE}"

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        end = text.find(CLOSE, len(OPEN))
        while end >= 0:
            inner = text[len(OPEN) : end]
            head = inner.partition("<arg_key>")[0]
            rest = inner[len(head) :].strip()
            if not rest or rest.endswith("</arg_value>"):
                return Section((self._call(head.strip(), rest, inner, tools),), end + len(CLOSE))
            end = text.find(CLOSE, end + 1)
        return None

    def _call(self, name: str, rest: str, inner: str, tools: Sequence[Mapping[str, Any]]) -> Found:
        pairs = _PAIR.findall(rest)
        if not re.fullmatch(r"[\w.:-]+", name) or (rest and not pairs):
            return Found(None, inner, "does not have the form NAME<arg_key>...</arg_value>")
        properties = schema_of(name, tools)
        arguments = {
            key.strip(): from_text(value, properties.get(key.strip())) for key, value in pairs
        }
        return Found(make_call(name, arguments), inner)
