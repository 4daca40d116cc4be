"""What a tokenizer's chat template does with tools, found by rendering examples.

Templates take calls in different forms: some need content that is null, arguments as JSON text, or
ids of nine characters. The first form whose rendering a family of `xtuner.calls.families` reads
back is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from xtuner.calls import families
from xtuner.calls.check import call_id
from xtuner.calls.families.base import Family
from xtuner.errors import DataError, ModelError

Dicts = list[dict[str, Any]]
Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Dicts, Tools, bool], str]
"""From messages as dicts, tools, and whether to append the generation prompt, to text."""

_ASK: dict[str, Any] = {"role": "user", "content": "Hello"}
_TOOLS = (families.PROBE_TOOL,)


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls."""

    empty_content: str | None = ""
    arguments_as_text: bool = False
    short_ids: bool = False

    def prepared(self, dicts: Dicts) -> Dicts:
        """The messages in this form."""
        ids: dict[str, str] = {}
        return [self._message(turn, ids) for turn in dicts]

    def _message(self, turn: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
        if self.short_ids and turn.get("tool_call_id") is not None:
            given = str(turn["tool_call_id"])
            turn = {**turn, "tool_call_id": ids.get(given, call_id(len(ids) + 1))}
        if not turn.get("tool_calls"):
            return turn
        calls = [self._call(call, ids) for call in turn["tool_calls"]]
        content = turn["content"] or self.empty_content
        return {**turn, "content": content, "tool_calls": calls}

    def _call(self, call: Mapping[str, Any], ids: dict[str, str]) -> dict[str, Any]:
        prepared = dict(call)
        if self.short_ids:
            given = str(call.get("id"))
            prepared["id"] = ids[given] = call_id(len(ids) + 1)
        if self.arguments_as_text and not isinstance(call["function"]["arguments"], str):
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            prepared["function"] = {**call["function"], "arguments": text}
        return prepared


@dataclass(frozen=True)
class NativeTools:
    """The tools of a chat template.

    Attributes:
        form: How it takes calls.
        family: How its calls are written; None if no family reads them.
        lists_tools: Whether it shows tools; DeepSeek's renders calls only.
        renders_calls: Whether it renders calls; SmolLM3's takes them in the content.
    """

    form: CallForm
    family: Family | None
    lists_tools: bool
    renders_calls: bool = True


def native_tools(render: Render) -> NativeTools | None:
    """What the template behind `render` does with tools; None if it has none."""
    try:
        prompt = render([_ASK], _TOOLS, True)
    except (DataError, ModelError):
        return None
    lists_tools = "look_up" in prompt
    forms = [CallForm(content, text) for text, content in product((False, True), ("", None))]
    shown = []
    for form in forms:
        rendered = _renderer(render, form)
        text = rendered(families.PROBES[0])
        if text is None or "look_up" not in text:
            continue
        shown.append(form)
        if family := families.find(rendered):
            return NativeTools(_with_ids(render, form), family, lists_tools)
    if shown and lists_tools:
        return NativeTools(_with_ids(render, shown[0]), None, lists_tools)
    default = families.load(families.DEFAULT)
    if not shown and lists_tools and all(mark in prompt for mark in ("<tool_call>", '"arguments"')):
        return NativeTools(CallForm(), default, lists_tools, renders_calls=False)
    return None


def _renderer(
    render: Render, form: CallForm
) -> Callable[[Sequence[Mapping[str, Any]]], str | None]:
    def rendered(calls: Sequence[Mapping[str, Any]]) -> str | None:
        turn = {"role": "assistant", "content": "", "tool_calls": [dict(call) for call in calls]}
        try:
            prompt = render([_ASK], _TOOLS, True)
            asked = render([_ASK], _TOOLS, False)
            text = render(form.prepared([_ASK, turn]), _TOOLS, False)
        except (DataError, ModelError):
            return None
        known = prompt if text.startswith(prompt) else asked
        return text[len(known) :] if text.startswith(known) else text

    return rendered


def _with_ids(render: Render, form: CallForm) -> CallForm:
    """`form` with short ids, if the template accepts no others."""
    call = {**families.PROBES[0][0], "id": "call_1"}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "x", "tool_call_id": "call_1", "name": "look_up"}
    for candidate in (form, CallForm(form.empty_content, form.arguments_as_text, short_ids=True)):
        try:
            render(candidate.prepared([_ASK, turn, result]), _TOOLS, False)
            return candidate
        except (DataError, ModelError):
            continue
    return form
