"""The template 'auto': the tokenizer's own chat template.

The characters of the assistant are located without parsing the template. For assistant turn i, the
text of ``messages[:i]`` with the generation prompt and the text of ``messages[:i + 1]`` up to the
stop token must both be prefixes of the full text; the turn is the text between them. The loss mask
thus starts exactly where generation starts, and ends with the token that ends an answer. If a
template marks assistant turns with ``{% generation %}``, the marks delimit the turns instead.

Some templates rewrite earlier turns (Qwen3 drops their reasoning, Mistral shows tools at the last
question only). The conversation is then trained on in several sequences, each of which ends with a
turn and shows the turns before it as a chat does (`TurnFinder.renderings`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any, Literal

from xtuner.calls.families import load as load_family
from xtuner.calls.families import reads_back
from xtuner.calls.families.base import Family
from xtuner.errors import DataError, ModelError
from xtuner.templates.base import Rendered, Template, hash_of
from xtuner.templates.moments import Moments, Text
from xtuner.templates.native_tools import NativeTools, native_tools
from xtuner.templates.renderer import Renderer, Tools
from xtuner.templates.table import NAMED
from xtuner.templates.thoughts import open_thought, split_thought
from xtuner.templates.tool_layout import INTERNLM2, ToolLayout, needs_layout
from xtuner.templates.turns import Stops, TurnFinder
from xtuner.types import Conversation, Encoded, Message

_PROBE = "xtuner"
_STOPPING_OPENERS = ("<|user|>", "<|observation|>")
_FURTHER_ENDS = (
    "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>",
    "<|observation|>", "<|tool_response>",
)  # fmt: skip
ONE_SEQUENCE = (
    "the model's chat template rewrites earlier turns, and this algorithm takes one sequence, so "
    "only the turns that it shows as a chat does are supervised. To supervise all of them, use a "
    "named template{fitting}"
)
CLOSED_THOUGHT = (
    "the prompt of the model's chat template closes the thought of an answer, so reasoning is not "
    "trained on; use a model whose chat template opens thoughts"
)
NO_TEXT_BEFORE_CALLS = (
    "the model's chat template does not render the text before a call, so it is not trained on; to "
    "train on it, use a named template"
)


class ChatTemplate(Template):
    """Renders with the tokenizer's chat template and locates the assistant turns in the text."""

    def __init__(self, tokenizer: Any, *, system: str = "") -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "prompt_template = 'auto': the tokenizer has no chat template, which is common for "
                "base models. Set prompt_template = 'default', or another named template: "
                + ", ".join(sorted(NAMED))
            )
        super().__init__("auto", tokenizer, system=system)
        self._tokenizer = tokenizer
        self._added = [
            t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip()
        ]
        self._native: NativeTools | Literal["unknown"] | None = "unknown"
        self._renderer = Renderer(tokenizer)
        source = self._renderer.source()
        self._reasoning_key = _reasoning_key(source)
        self._has_system_turn = self._shows_system()
        self._stops = self._find_stops()
        stop = self._stops.text
        self.stop_words = (stop,) if stop else tuple({*self._stops.openers.values()})
        ends = [t for t in _FURTHER_ENDS if t in source and t in self._added]
        self._further_ends = tuple(t for t in (tokenizer.eos_token, *ends) if t)
        self.stop_token_ids = self._token_ids((tokenizer.eos_token or "", *self.stop_words, *ends))

    def render(
        self, messages: Sequence[Message], *, tools: Tools = (), prompt: bool = False
    ) -> Rendered:
        """See `Template.render`; the turns are those that the text shows as a chat does."""
        finder = self._finder(messages, tools)
        return finder.prompt() if prompt else finder.complete()

    def encode(self, conversation: Conversation) -> Encoded:
        """See `Template.encode`; turns that one text cannot show as a chat does are not supervised,
        with a warning."""
        first, *more = self.sequences(conversation)
        if more:
            self._warn_once(ONE_SEQUENCE.format(fitting=self._fitting()))
        return first

    def sequences(self, conversation: Conversation) -> list[Encoded]:
        """See `Template.sequences`."""
        if not conversation.messages:
            return [Encoded([], [])]
        finder = self._finder(conversation.messages, conversation.tools)
        texts, reasons = finder.renderings()
        if reasons:
            supervised = any(turn.supervised for text in texts for turn in text.turns)
            self._report_inexact(reasons[0], is_rest_learned=supervised)
        if finder.dropped_reasoning:
            self._warn_once(CLOSED_THOUGHT)
        return [self._encoded(text) for text in texts]

    def answer(self, text: str) -> Message:
        """See `Template.answer`; a thought that the prompt opened is the reasoning of the turn."""
        if not self._opens_thought:
            return Message("assistant", text)
        thought, content = split_thought(text)
        return Message("assistant", content, reasoning=thought)

    @cached_property
    def _opens_thought(self) -> bool:
        """Whether prompts open a thought."""
        prompt = self._text([{"role": "user", "content": _PROBE}], prompt=True)
        return open_thought(prompt) is not None

    def _finder(self, messages: Sequence[Message], tools: Tools) -> TurnFinder:
        turns, shown = self._with_tools(messages, tools)

        def render(dicts: list[dict[str, Any]], prompt: bool) -> Text:
            return self._renderer.text(dicts, shown, prompt=prompt)

        def repaired(index: int, text: str) -> str:
            message = turns[index][1]
            return self._repaired(message, text, tools) if message and message.tool_calls else text

        dicts = [turn for turn, _ in turns]
        moments = Moments(dicts, render, reasoning_key=self._reasoning_key, repaired=repaired)
        return TurnFinder(
            moments,
            [message for _, message in turns],
            stops=self._stops,
            has_tools=bool(shown),
            repaired=repaired,
            check=self._check,
        )

    def _repaired(self, message: Message, text: str, tools: Tools) -> str:
        """The text of a turn with calls, as its family writes it if only that can be read.

        DeepSeek's templates end only several calls, and begin only the first of a conversation.
        """
        native, stop = self._native_tools(), self._stops.text
        if native is None or native.family is None or not native.renders_calls:
            return text
        family, calls = native.family, message.tool_calls

        def is_readable(turn: str) -> bool:
            body, stopped, rest = turn.partition(stop) if stop else (turn, "", "")
            if stop and not stopped and not turn.endswith(self._further_ends):
                return False
            return not rest and reads_back(family, body, calls, tools=tools)

        if is_readable(text):
            return text
        written = family.render(list(calls)) + stop
        return message.content + written if is_readable(written) else text

    def fingerprint(self) -> str:
        """See `Template.fingerprint`."""
        source = self._tokenizer.chat_template
        shows_today = "strftime_now" in str(source) and not self._renderer.variables
        today = date.today().isoformat() if shows_today else ""
        return hash_of("auto", source, self._tokenizer.special_tokens_map, self.system, today)

    def _check(self, turn: Mapping[str, Any], rendered: str) -> None:
        self._check_calls(turn, rendered)
        text = str(turn.get("content") or "").strip() if turn.get("tool_calls") else ""
        if text and split_thought(text)[1].strip() not in rendered:
            self._warn_once(NO_TEXT_BEFORE_CALLS)
        self._check_reasoning(turn, rendered)

    @property
    def tool_family(self) -> Family | None:
        """See `Template.tool_family`."""
        native = self._native_tools()
        return native.family if native else self._layout.family

    def _native_tools(self) -> NativeTools | None:
        """What the chat template does with tools; None if it has none."""
        if self._native == "unknown":
            self._native = native_tools(
                lambda dicts, tools, prompt: self._renderer.text(dicts, tools, prompt=prompt).text
            )
        return self._native

    @cached_property
    def _layout(self) -> ToolLayout:
        """How tools are written if the chat template has none."""
        if not all(word in self._added for word in load_family(INTERNLM2).markers):
            return ToolLayout.of()
        turn = {"role": "system name=<|plugin|>", "content": _PROBE}
        text = self._text([turn, {"role": "user", "content": "Hello"}])
        shown = f"{turn['role']}\n{_PROBE}" in text
        return ToolLayout.of(INTERNLM2, further_roles=True) if shown else ToolLayout.of()

    def _with_tools(
        self, messages: Sequence[Message], tools: Tools
    ) -> tuple[list[tuple[dict[str, Any], Message | None]], Tools]:
        """The messages as dicts, and the tools that are left for the chat template to render."""
        messages = self._with_system(messages)
        if not needs_layout(messages, tools):
            return self._as_turns([(m.as_dict(), m) for m in messages]), ()
        native = self._native_tools()
        if native and native.family and tools and not native.lists_tools:
            messages, tools = ToolLayout(native.family).with_listing(messages, tools), ()
        if native and native.renders_calls:
            dicts = native.form.prepared([message.as_dict() for message in messages])
            return self._as_turns(list(zip(dicts, messages, strict=True))), tools
        listed = () if native else tools
        if not native:
            self._warn_once(
                "the model's chat template has no tools; tools and calls are written in the layout "
                f"'{self._layout.family.name}' (docs/tools.md)"
            )
        layout = ToolLayout(native.family) if native and native.family else self._layout
        turns: list[tuple[dict[str, Any], Message | None]] = []
        for role, content, message in layout.write_out(messages, listed):
            turn = {"role": role, "content": content}
            if message and message.reasoning:
                turn["reasoning_content"] = message.reasoning
            turns.append((turn, message))
        return self._as_turns(turns), tools if native else ()

    def _as_turns(
        self, pairs: Sequence[tuple[dict[str, Any], Message | None]]
    ) -> list[tuple[dict[str, Any], Message | None]]:
        """Turns and their messages, with the system message where the template accepts it."""
        turns = [(self._named_reasoning(turn), message) for turn, message in pairs]
        if self._has_system_turn or not turns or turns[0][0]["role"] != "system":
            return turns
        system = turns[0][0]["content"]
        for index, (turn, message) in enumerate(turns[1:], start=1):
            if turn["role"] == "user":
                content = f"{system}\n\n{turn['content']}" if system else turn["content"]
                asked = {**turn, "content": content}
                return [*turns[1:index], (asked, message), *turns[index + 1 :]]
        raise DataError(
            "the model's chat template does not support a system message without a user turn"
        )

    def _named_reasoning(self, turn: dict[str, Any]) -> dict[str, Any]:
        """`turn` with its reasoning under the key that the template reads."""
        reasoning = turn.pop("reasoning_content", "")
        return {**turn, self._reasoning_key: reasoning} if reasoning else turn

    def _text(self, dicts: list[dict[str, Any]], *, prompt: bool = False) -> str:
        """The text of the messages; empty if the template rejects them."""
        try:
            return self._renderer.text(dicts, prompt=prompt).text
        except DataError:
            return ""

    def _shows_system(self) -> bool:
        """Whether the template renders system messages; Gemma's rejects them, some drop them."""
        user = {"role": "user", "content": "Hello"}
        return _PROBE in self._text([{"role": "system", "content": _PROBE}, user])

    def _find_stops(self) -> Stops:
        """What the template writes after an answer: the first added token, otherwise the text."""
        dicts = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            tail = self._renderer.text(dicts).text.rpartition(_PROBE)[2]
        except DataError:
            return Stops(str(self._tokenizer.eos_token or ""))
        found = [(at, token) for token in self._added if (at := tail.find(token)) >= 0]
        if found:
            return Stops(str(min(found, key=lambda match: (match[0], -len(match[1])))[1]))
        openers = {} if tail.strip() else self._find_openers(dicts)
        if not tail.strip() and not openers:
            self._warn_once(
                "the model's chat template writes nothing after an answer, so training cannot "
                "teach the model to stop; set prompt_template to a named template"
                f"{self._fitting()}"
            )
        return Stops(tail.strip(), openers)

    def _find_openers(self, dicts: list[dict[str, Any]]) -> dict[str, str]:
        """The tokens that open the turn after an answer, by the role of that turn.

        GLM writes nothing after an answer and stops by opening the next turn.
        """
        openers = {}
        for role in ("user", "tool"):
            text = self._text([*dicts, {"role": role, "content": "Hello"}])
            tail = text.rpartition(_PROBE)[2].lstrip()
            if found := [t for t in _STOPPING_OPENERS if t in self._added and tail.startswith(t)]:
                openers[role] = found[0]
        return openers if "user" in openers else {}

    def _check_calls(self, turn: Mapping[str, Any], rendered: str) -> None:
        for call in turn.get("tool_calls", ()):
            name = str(call.get("function", call).get("name", ""))
            if name not in rendered:
                raise DataError(
                    f"the model's chat template does not render the call of tool '{name}'; use a "
                    "model whose template supports tools, or write the call into the content"
                )

    def _check_reasoning(self, turn: Mapping[str, Any], rendered: str) -> None:
        reasoning = turn.get(self._reasoning_key, "").strip()
        if reasoning and reasoning not in rendered:
            self._warn_of_reasoning("the model's chat template")

    def _report_inexact(self, reason: str, *, is_rest_learned: bool) -> None:
        others = (
            f"Use a named template{self._fitting()}, or a chat template that marks answers with "
            "{% generation %}"
        )
        if not is_rest_learned:
            raise ModelError(
                "the model's chat template cannot show an answer in training as in a chat: "
                f"{reason}. {others}."
            )
        self._warn_once(
            "the model's chat template cannot show some answers in training as in a chat: "
            f"{reason}. They are not supervised. {others} to supervise all of them."
        )

    def _fitting(self) -> str:
        """Suggest the named template whose tokens all occur in the output of this one."""
        turns = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
        written = self._text(turns, prompt=True) or self._renderer.source()
        fits = {name: spec.tokens for name, spec in NAMED.items() if spec.tokens}
        fits = {n: tokens for n, tokens in fits.items() if all(t in written for t in tokens)}
        best = max(fits, key=lambda name: len("".join(fits[name])), default="")
        return f" that fits, such as '{best}'" if best else ""


def _reasoning_key(source: str) -> str:
    """The key under which a chat template reads reasoning."""
    keys = ("reasoning_content", "thinking", "reasoning")
    return next((key for key in keys if re.search(rf"[.'\"]{key}\b", source)), keys[0])
