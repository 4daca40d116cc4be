"""How model families write calls: one row per family in `FAMILIES`.

A family renders calls to the text that a model writes, and reads them back while the text grows.
`find` selects the family of a chat template by what the template renders: of those that read it
back exactly one that writes the same text, otherwise the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xtuner.calls.families.base import Family, parse
from xtuner.calls.families.blocks import Blocks, DeepSeek, Kimi
from xtuner.calls.families.gemma import Gemma
from xtuner.calls.families.internlm2 import InternLM2
from xtuner.calls.families.json_text import BareJson, TaggedJson
from xtuner.calls.families.mistral import Mistral
from xtuner.calls.families.python_text import Moss, Pythonic
from xtuner.calls.families.react import React
from xtuner.calls.families.xml_text import GlmXml, InvokeXml, NamedTag, QwenXml
from xtuner.calls.read import arguments_of, make_call, name_of
from xtuner.errors import ConfigError, did_you_mean

DEFAULT = "hermes"
"""The family of models whose template has no tools."""

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # Qwen 2.5 and 3, Hermes, SmolLM3; the default
        TaggedJson("hermes", "<tool_call>", "</tool_call>", newline=True),
        NamedTag("function_tags"),  # Functionary, and Llama 3.1 with tools of one's own
        QwenXml("qwen_xml"),  # Qwen3-Coder, Qwen 3.5
        QwenXml(
            "seed_oss", opens=("<seed:tool_call>",),
            markers=("<seed:tool_call>", "</seed:tool_call>"),
        ),
        GlmXml("glm4_5"),
        InvokeXml(
            "minimax_m2", opens=("<minimax:tool_call>",),
            markers=("<minimax:tool_call>", "</minimax:tool_call>"),
        ),
        InvokeXml(
            "deepseek_v3_2", opens=("<｜DSML｜function_calls>",), prefix="｜DSML｜", typed=True,
            markers=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        ),
        InvokeXml(
            "deepseek_v4", opens=("<｜DSML｜tool_calls>",), prefix="｜DSML｜", typed=True,
            markers=("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),
        ),
        InternLM2("internlm2"),
        Mistral("mistral"),
        DeepSeek("deepseek_v3", fenced=True),  # V3, R1
        DeepSeek("deepseek_v3_1", fenced=False),
        Kimi("kimi_k2"),
        TaggedJson("phi4", "<|tool_call|>", "<|/tool_call|>", as_list=True),
        TaggedJson("granite", "<|tool_call|>", "", as_list=True),
        TaggedJson("nemotron", "<TOOLCALL>", "</TOOLCALL>", as_list=True),
        TaggedJson(
            "command_r", "<|START_ACTION|>", "<|END_ACTION|>", as_list=True, names="tool_name",
            arguments="parameters", ids="tool_call_id",
        ),
        Gemma("gemma4"),
        Pythonic("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),
        Moss("moss"),
        Blocks("glm4"),
        BareJson("llama3"),  # Llama 3.1 to 3.3
        Pythonic("pythonic", "", ""),  # Llama 3.2 and 4
        React("react"),  # lagent, ToolBench, Agent-FLAN
    )
}  # fmt: skip


def load(name: str) -> Family:
    """The family `name`.

    Raises:
        ConfigError: There is no such family.
    """
    if name not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise ConfigError(
            f"tool family {name!r}: must be one of {allowed}{did_you_mean(name, list(FAMILIES))}"
        )
    return FAMILIES[name]


PROBES: tuple[tuple[dict[str, Any], ...], ...] = (
    (make_call("look_up", {"key": 'x "y"\n</z>', "count": 3}, call_id="call00001"),),
    (
        make_call("look_up", {"key": "x"}, call_id="call00001"),
        make_call("look_up", {"key": "y", "deep": {"a": [1, None, True]}}, call_id="call00002"),
    ),
)
PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {
                "key": {"type": "string", "description": "A key."},
                "count": {"type": "integer", "description": "How many."},
                "deep": {"type": "object", "description": "More."},
            },
            "required": ["key"],
        },
    },
}
"""The tool of `PROBES`."""


SIMPLE_PROBES = ((make_call("look_up", {"key": "x", "count": 3}, call_id="call00001"),),)
"""For templates that do not quote what they render."""


def find(rendered: Callable[[Sequence[Mapping[str, Any]]], str | None]) -> Family | None:
    """The family that reads back what `rendered` makes of `PROBES`, or of simpler calls.

    Args:
        rendered: The text of an assistant turn with these calls and no content, without its stop;
            None if the template cannot render them (some take one call per turn).
    """
    for probes in (PROBES, SIMPLE_PROBES):
        texts = [rendered(calls) for calls in probes]
        if texts[0] is None:
            return None
        found = [
            family
            for family in FAMILIES.values()
            if all(
                text is None or reads_back(family, text, calls, tools=[PROBE_TOOL])
                for text, calls in zip(texts, probes, strict=True)
            )
        ]
        exact = (family for family in found if family.render(probes[0]).strip() in texts[0])
        if found:
            return next(exact, found[0])
    return None


def reads_back(
    family: Family,
    text: str,
    calls: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]],
) -> bool:
    """Whether `family` finds exactly `calls` in `text`, which may have other text around them."""
    _, found = parse(family, text, tools=tools)
    if len(found) != len(calls) or any(call.problem for call in found):
        return False
    return all(
        (name_of(got.call), arguments_of(got.call)) == (name_of(call), arguments_of(call))
        for got, call in zip(found, calls, strict=True)
        if got.call is not None
    )
