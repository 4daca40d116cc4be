"""Calls as Python: ``[weather(city="Paris")]`` (Llama 3.2 and 4, LFM2), and MOSS's commands.

The code is parsed and never executed; arguments are literals.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.calls.families.base import Found, Section, after
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.calls.scan import skip_space


def python_end(text: str, start: int) -> int | None:
    """Index after the bracketed expression at `start`; None if it is not complete."""
    depth, at, quote = 0, start, ""
    while at < len(text):
        character = text[at]
        if quote:
            if character == "\\":
                at += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return at + 1
        at += 1
    return None


def read_python(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[Found, ...]:
    """The calls in ``[f(a=1), g("x")]`` or ``f(a=1), g("x")``."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return (Found(None, text, "is not a list of Python calls"),)
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    return tuple(_call(node, text, tools) for node in nodes)


def _call(node: ast.expr, text: str, tools: Sequence[Mapping[str, Any]]) -> Found:
    if not isinstance(node, ast.Call):
        return Found(None, text, "is not a list of Python calls")
    name = ast.unparse(node.func)
    positional = _parameters(name, tools)
    try:
        values = [ast.literal_eval(value) for value in node.args]
        named = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return Found(None, text, "has arguments that are not literals")
    if len(values) > len(positional):
        positional = (*positional, *(f"argument_{i}" for i in range(len(positional), len(values))))
    arguments = dict(zip(positional, values, strict=False))
    return Found(make_call(name, {**arguments, **named}), text)


def _parameters(name: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    for tool in tools:
        if name_of(tool) == name:
            return tuple(tool["function"].get("parameters", {}).get("properties", {}))
    return ()


def python_call(call: Mapping[str, Any]) -> str:
    """``name(a=1, b='x')``."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in arguments_of(call).items())
    return f"{name_of(call)}({arguments})"


@dataclass(frozen=True)
class Pythonic:
    """A list of Python calls, between tags or as the complete answer."""

    name: str
    opening: str
    closing: str

    @property
    def only_at_start(self) -> bool:
        """See `Family`."""
        return not self.opening

    @property
    def opens(self) -> tuple[str, ...]:
        """See `Family`."""
        return (self.opening,) if self.opening else ("[", "<|python_start|>")

    @property
    def markers(self) -> tuple[str, ...]:
        """See `Family`."""
        if self.opening:
            return (self.opening, self.closing)
        return ("<|python_start|>", "<|python_end|>")

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return f"{self.opening}[{', '.join(map(python_call, calls))}]{self.closing}"

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`: without tags, a list that holds no calls is text."""
        opening, closing = self.opening, self.closing
        start = skip_space(text, 0)
        if not opening and text.startswith("<|python_start|>", start):
            opening, closing = "<|python_start|>", "<|python_end|>"
        start = skip_space(text, start + len(opening))
        if start < len(text) and text[start] != "[":
            return Section((), 0)
        end = python_end(text, start)
        if end is None:
            return None
        found = read_python(text[start:end], tools)
        if not opening and any(each.call is None for each in found):
            return Section((), 0)
        stop = after(text, end, closing)
        return None if stop is None else Section(found, stop)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: a list that was never closed is text if it has no tags."""
        if not self.opening and not any(name_of(tool) in text for tool in tools):
            return Section((), 0)
        return None


@dataclass(frozen=True)
class Moss:
    """MOSS: ``<|Commands|>: Calculate("2+3")<eoc>``; ``None`` is not a command."""

    name: str
    only_at_start: bool = False
    opens: tuple[str, ...] = ("<|Commands|>:",)
    markers: tuple[str, ...] = ("<|Commands|>", "<eoc>")

    def render(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """See `Family.render`."""
        return f"<|Commands|>: {', '.join(self._one(call) for call in calls)}<eoc>"

    def _one(self, call: Mapping[str, Any]) -> str:
        values = list(arguments_of(call).values())
        if len(values) == 1 and isinstance(values[0], str):
            return f"{name_of(call)}({_quoted(values[0])})"
        return python_call(call)

    def read(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.read`."""
        start = len(self.opens[0])
        end = text.find("<eoc>", start)
        if end < 0:
            return None
        return Section(self.commands(text[start:end], tools), end + len("<eoc>"))

    def commands(self, text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[Found, ...]:
        """The calls of a line of commands."""
        return () if text.strip() in ("None", "") else read_python(text, tools)

    def ended(self, text: str, tools: Sequence[Mapping[str, Any]]) -> Section | None:
        """See `Family.ended`: ``<eoc>`` may have been the stop word."""
        found = self.commands(text[len(self.opens[0]) :], tools)
        complete = all(each.call is not None for each in found)
        return Section(found, len(text)) if complete else None


def _quoted(text: str) -> str:
    """A string in double quotes, as in MOSS's data."""
    import json

    return json.dumps(text, ensure_ascii=False)
