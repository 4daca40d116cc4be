"""Write tools, calls and results as ordinary turns, for templates that do not render them.

The default layout, with the family 'hermes':

    system     ...the system message, then how to call tools and the tools as JSON, one per line
    assistant  ...text <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    user       <tool_response>...</tool_response>, one for each result

InternLM2's own protocol has turns of further roles: ``system name=<|plugin|>`` lists the tools,
``environment name=<|plugin|>`` holds a result, and ``name=<|interpreter|>`` marks code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from xtuner.calls.families import DEFAULT, load
from xtuner.calls.families.base import Family
from xtuner.calls.families.internlm2 import CODE_TOOL, INTERPRETER, PLUGIN, is_code
from xtuner.calls.read import make_call, name_of
from xtuner.types import Message

INTERNLM2 = "internlm2"


class Written(NamedTuple):
    """A turn as it is rendered; `message` is the turn of the conversation that it shows."""

    role: str
    content: str
    message: Message | None


@dataclass(frozen=True)
class ToolLayout:
    """How tools, calls and results are written.

    Attributes:
        family: The family of the calls.
        further_roles: Tools and results are turns of their own, as in InternLM2's protocol.
    """

    family: Family
    further_roles: bool = False

    @classmethod
    def of(cls, family: str = DEFAULT, *, further_roles: bool = False) -> ToolLayout:
        """The layout with the family of this name."""
        return cls(load(family), further_roles)

    def write_out(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[Written]:
        """The turns of a conversation, tools included."""
        if not tools:
            return list(self._turns(messages))
        if not self.further_roles:
            return list(self._turns(self.with_listing(messages, tools)))
        turns = list(self._turns(messages))
        first = 1 if turns and turns[0].role == "system" else 0
        return [*turns[:first], *self._tool_turns(tools), *turns[first:]]

    def with_listing(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> list[Message]:
        """The messages with the tools in the system message."""
        listing = self.listing(tools)
        if not messages or messages[0].role != "system":
            return [Message("system", listing), *messages]
        system = messages[0].content
        content = f"{system}\n\n{listing}" if system.strip() else listing
        return [replace(messages[0], content=content), *messages[1:]]

    def listing(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The text that tells the model its tools and how to call them."""
        example = self.family.render([make_call("NAME", {"ARGUMENT": "VALUE"})])
        lines = "\n".join(json.dumps(dict(t["function"]), ensure_ascii=False) for t in tools)
        return (
            f"You can call these tools:\n<tools>\n{lines}\n</tools>\n"
            f"To call a tool, write its name and arguments like this:\n{example}"
        )

    def call_text(self, message: Message) -> str:
        """The content of an assistant turn with its calls."""
        calls = self.family.render(message.tool_calls)
        if self.further_roles or not message.content.strip():
            return message.content + calls
        return f"{message.content.rstrip()}\n{calls}"

    def _turns(self, messages: Sequence[Message]) -> Iterator[Written]:
        results: list[str] = []
        coded = False
        for message in messages:
            if message.role == "tool" and self.further_roles:
                name = INTERPRETER if coded or message.name == CODE_TOOL else PLUGIN
                yield Written(f"environment name={name}", message.content, message)
                continue
            if message.role == "tool":
                results.append(f"<tool_response>\n{message.content}\n</tool_response>")
                continue
            if results:
                yield Written("user", "\n".join(results), None)
                results = []
            coded = bool(message.tool_calls) and all(map(is_code, message.tool_calls))
            content = self.call_text(message) if message.tool_calls else message.content
            yield Written(message.role, content, message)
        if results:
            yield Written("user", "\n".join(results), None)

    def _tool_turns(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[Written]:
        """The turns of InternLM2 that list the tools."""
        plugins = [dict(tool["function"]) for tool in tools if name_of(tool) != CODE_TOOL]
        if len(plugins) < len(tools):
            words = next(t["function"] for t in tools if name_of(t) == CODE_TOOL)
            text = f"{words.get('description', '')}\n```python\ncode\n```".lstrip()
            yield Written(f"system name={INTERPRETER}", text, None)
        if plugins:
            listing = json.dumps(plugins, ensure_ascii=False, indent=2)
            yield Written(f"system name={PLUGIN}", listing, None)


def needs_layout(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation has tools, calls or results."""
    return bool(tools) or any(m.tool_calls or m.role == "tool" for m in messages)
