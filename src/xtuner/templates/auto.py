"""The template 'auto': the tokenizer's own chat template.

The characters of the assistant are located without parsing the template. For assistant turn i, the
text of ``messages[:i]`` with the generation prompt and the text of ``messages[:i + 1]`` up to the
stop token must both be prefixes of the full text; the turn is the text between them. The loss mask
thus starts exactly where generation starts, and ends with the token that ends an answer. If a
template marks assistant turns with ``{% generation %}``, the marks delimit the turns instead.

Some templates rewrite earlier turns (Qwen3 drops their reasoning). A turn that training would
render differently from chat is excluded from the loss, with a warning; if none is left, it is an
error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any, Literal

from xtuner.calls.families import load as load_family
from xtuner.calls.families.base import Family
from xtuner.errors import DataError, ModelError
from xtuner.templates.base import (
    NO_REASONING,
    Rendered,
    Template,
    Turn,
    hash_of,
    masked_spans,
)
from xtuner.templates.bounds import OutOfBoundsError, bounded, check_output
from xtuner.templates.native_tools import NativeTools, native_tools
from xtuner.templates.table import NAMED
from xtuner.templates.tool_layout import INTERNLM2, ToolLayout, needs_layout
from xtuner.types import Message

Tools = Sequence[Mapping[str, Any]]

_PROBE = "xtuner"
_EXCEEDS = "the tokenizer's chat template exceeds"
_NAME_ANOTHER = "name another, such as prompt_template = 'chatml'"
_PATIENCE = 3
"""So many conversations may exceed the bounds before the template is not rendered any more."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_STOPPING_OPENERS = ("<|user|>", "<|observation|>")
_FURTHER_ENDS = ("<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_DATE = "26 Jul 2024"
"""The default date of Llama 3 templates; fixed, so that runs are reproducible."""


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
        self._exceeded = 0
        self._marked: dict[str, bool] = {}
        self._variables = {"date_string": _DATE} if "date_string" in self._source(()) else {}
        self._reasoning_key = _reasoning_key(self._source(()))
        self._has_system_turn = self._shows_system()
        self._openers: dict[str, str] = {}
        self._stop = self._find_stop()
        self.stop_words = (self._stop,) if self._stop else tuple({*self._openers.values()})
        ends = [t for t in _FURTHER_ENDS if t in self._source(()) and t in self._added]
        self.stop_token_ids = self._token_ids((tokenizer.eos_token or "", *self.stop_words, *ends))

    def render(
        self, messages: Sequence[Message], *, tools: Tools = (), prompt: bool = False
    ) -> Rendered:
        """See `Template.render`."""
        turns, tools = self._with_tools(messages, tools)
        dicts = [turn for turn, _ in turns]
        text, marks = self._text(dicts, tools, prompt=prompt)
        answers = [i for i, turn in enumerate(dicts) if turn["role"] == "assistant"]
        bounds = marks if len(marks) == len(answers) else [None] * len(answers)
        found: list[Turn] = []
        inexact = 0
        for index, mark in zip(answers, bounds, strict=True):
            message = turns[index][1]
            supervised = message is not None and message.supervised
            span = self._span(text, dicts, index, tools, mark=mark, prompt=prompt)
            if span is not None:
                masked = masked_spans(message, text, *span) if message else ()
                weight = message.weight if message else 1.0
                found.append(Turn(*span, supervised, masked, weight))
            elif supervised and any(turn["role"] == "user" for turn in dicts[:index]):
                inexact += 1
        if inexact and not prompt:
            self._report_inexact(left=sum(turn.supervised for turn in found))
        return self._ended_by_opener(Rendered(text, found), dicts, prompt=prompt)

    def _ended_by_opener(
        self, rendered: Rendered, dicts: list[dict[str, Any]], *, prompt: bool
    ) -> Rendered:
        """With the opener of the next turn as the end of each answer, where that is the stop."""
        text, turns = rendered
        if not self._openers or not turns:
            return rendered
        if not prompt and dicts[-1]["role"] == "assistant" and turns[-1].end == len(text):
            following = "tool" if dicts[-1].get("tool_calls") else "user"
            text += self._openers.get(following, self._openers["user"])
        ended = []
        for turn in turns:
            rest = text[turn.end :]
            space = len(rest) - len(rest.lstrip())
            opener = next((o for o in self._openers.values() if rest[space:].startswith(o)), "")
            ended.append(turn._replace(end=turn.end + (space + len(opener) if opener else 0)))
        return Rendered(text, ended)

    def fingerprint(self) -> str:
        """See `Template.fingerprint`."""
        source = self._tokenizer.chat_template
        shows_today = "strftime_now" in str(source) and not self._variables
        today = date.today().isoformat() if shows_today else ""
        return hash_of("auto", source, self._tokenizer.special_tokens_map, self.system, today)

    def _span(
        self,
        text: str,
        dicts: list[dict[str, Any]],
        index: int,
        tools: Tools,
        *,
        mark: tuple[int, int] | None,
        prompt: bool,
    ) -> tuple[int, int] | None:
        """Start and end of turn `index` in `text`; None if a chat would render it differently."""
        try:
            prefix = self._text(dicts[:index], tools, prompt=True)[0]
        except DataError:
            prefix = None  # there is no user turn yet, but the template requires one
        start = len(prefix) if prefix is not None and text.startswith(prefix) else None
        if mark is not None:
            if start is None or not mark[0] <= start <= mark[1]:
                start = mark[0]
            turn = self._marked_turn(text, mark)
        elif start is None:
            return None
        elif index + 1 == len(dicts) and not prompt:
            turn = text
        else:
            turn = self._text(dicts[: index + 1], tools)[0]
        end = self._end_of(turn, start)
        if text[:end] != turn[:end] and (tools or "tool_calls" in dicts[index]):
            # Qwen 3 opens the last turn alone with an empty thought
            turn = turn[:start] + _EMPTY_THOUGHT.sub("", turn[start:], count=1)
            end = self._end_of(turn, start)
        if text[:end] != turn[:end]:
            return None
        self._check_calls(dicts[index], text[start:end])
        self._check_reasoning(dicts[index], text[start:end])
        return start, end

    def _marked_turn(self, text: str, mark: tuple[int, int]) -> str:
        """`text` up to the end of a marked turn, including a stop right after the mark."""
        end = mark[1]
        if self._stop and self._stop not in text[mark[0] : end]:
            gap = len(text) - end - len(text[end:].lstrip())
            if text.startswith(self._stop, end + gap):
                end += gap + len(self._stop)
        return text[:end]

    def _end_of(self, turn: str, start: int) -> int:
        """The end of the stop in `turn`, which ends with an answer that begins at `start`."""
        at = turn.rfind(self._stop, start) if self._stop else -1
        if at >= 0:
            return at + len(self._stop)
        return start + len(turn[start:].rstrip())

    def _text(
        self, dicts: list[dict[str, Any]], tools: Tools = (), *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text and the character spans that ``{% generation %}`` marks in it.

        `apply_chat_template` returns the marks only as tokens, so its renderer is called directly.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self._source(tools)
        if self._exceeded > _PATIENCE:
            raise ModelError(f"{_EXCEEDS} bounds again and again; {_NAME_ANOTHER}")
        try:
            with bounded():
                texts, marks = render_jinja_template(
                    [dicts],
                    tools=[dict(tool) for tool in tools] or None,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._is_marked(source),
                    **self._tokenizer.special_tokens_map,
                    **self._variables,
                )
            check_output(len(texts[0]), given=_characters([dicts, tools]))
        except OutOfBoundsError as error:
            self._exceeded += 1
            raise ModelError(f"{_EXCEEDS} its bounds: it {error}; {_NAME_ANOTHER}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"the tokenizer's chat template is invalid (line {error.lineno}: {error.message}); "
                f"{_NAME_ANOTHER}"
            ) from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(turn["role"] for turn in dicts) or "none"
            raise DataError(
                f"the model's chat template rejects these messages (roles: {roles}): {error}"
            ) from error
        return texts[0], [(a, b) for a, b in marks[0]] if marks else []

    def _source(self, tools: Tools) -> str:
        """The template source; some tokenizers have a separate one for tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=[dict(t) for t in tools] or None))
        except ValueError as error:
            raise ModelError(f"prompt_template = 'auto': {error}") from error

    def _is_marked(self, source: str) -> bool:
        if source not in self._marked:
            self._marked[source] = _GENERATION.search(source) is not None
        return self._marked[source]

    @property
    def tool_family(self) -> Family | None:
        """See `Template.tool_family`."""
        native = self._native_tools()
        return native.family if native else self._layout.family

    def _native_tools(self) -> NativeTools | None:
        """What the chat template does with tools; None if it has none."""
        if self._native == "unknown":
            self._native = native_tools(
                lambda dicts, tools, prompt: self._text(dicts, tools, prompt=prompt)[0]
            )
        return self._native

    @cached_property
    def _layout(self) -> ToolLayout:
        """How tools are written if the chat template has none."""
        if not all(word in self._added for word in load_family(INTERNLM2).markers):
            return ToolLayout.of()
        turn = {"role": "system name=<|plugin|>", "content": _PROBE}
        try:
            text = self._text([turn, {"role": "user", "content": "Hello"}])[0]
        except DataError:
            text = ""
        shown = f"{turn['role']}\n{_PROBE}" in text
        return ToolLayout.of(INTERNLM2, further_roles=True) if shown else ToolLayout.of()

    def _with_tools(
        self, messages: Sequence[Message], tools: Tools
    ) -> tuple[list[tuple[dict[str, Any], Message | None]], Tools]:
        """The messages as dicts, and the tools that are left for the chat template to render."""
        if self.system and messages and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        if not needs_layout(messages, tools):
            return self._as_turns([(m.as_dict(), m) for m in messages]), ()
        native = self._native_tools()
        if native and native.family and tools and not native.lists_tools:
            messages, tools = ToolLayout(native.family).with_listing(messages, tools), ()
        if native:
            dicts = native.form.prepared([message.as_dict() for message in messages])
            return self._as_turns(list(zip(dicts, messages, strict=True))), tools
        self._warn_once(
            "the model's chat template has no tools; tools and calls are written in the layout "
            f"'{self._layout.family.name}' (docs/tools.md)"
        )
        turns: list[tuple[dict[str, Any], Message | None]] = []
        for role, content, message in self._layout.write_out(messages, tools):
            turn = {"role": role, "content": content}
            if message and message.reasoning:
                turn["reasoning_content"] = message.reasoning
            turns.append((turn, message))
        return self._as_turns(turns), ()

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
                asked = {
                    **turn,
                    "content": f"{system}\n\n{turn['content']}" if system else turn["content"],
                }
                return [*turns[1:index], (asked, message), *turns[index + 1 :]]
        raise DataError(
            "the model's chat template does not support a system message without a user turn"
        )

    def _named_reasoning(self, turn: dict[str, Any]) -> dict[str, Any]:
        """`turn` with its reasoning under the key that the template reads."""
        reasoning = turn.pop("reasoning_content", "")
        return {**turn, self._reasoning_key: reasoning} if reasoning else turn

    def _shows_system(self) -> bool:
        """Whether the template renders system messages; Gemma's rejects them, some drop them."""
        user = {"role": "user", "content": "Hello"}
        try:
            return _PROBE in self._text([{"role": "system", "content": _PROBE}, user])[0]
        except DataError:
            return False

    def _find_stop(self) -> str:
        """What the template writes after an answer: the first added token, otherwise the text."""
        dicts = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            tail = self._text(dicts)[0].rpartition(_PROBE)[2]
        except DataError:
            return str(self._tokenizer.eos_token or "")
        found = [(at, token) for token in self._added if (at := tail.find(token)) >= 0]
        if found:
            return str(min(found, key=lambda match: (match[0], -len(match[1])))[1])
        self._openers = {} if tail.strip() else self._find_openers(dicts)
        if not tail.strip() and not self._openers:
            self._warn_once(
                "the model's chat template writes nothing after an answer, so training cannot "
                "teach the model to stop; set prompt_template to a named template"
                f"{self._fitting()}"
            )
        return tail.strip()

    def _find_openers(self, dicts: list[dict[str, Any]]) -> dict[str, str]:
        """The tokens that open the turn after an answer, by the role of that turn.

        GLM writes nothing after an answer and stops by opening the next turn.
        """
        openers = {}
        for role in ("user", "tool"):
            try:
                text = self._text([*dicts, {"role": role, "content": "Hello"}])[0]
            except DataError:
                continue
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
            self._warn_once(NO_REASONING.format(template="the model's chat template"))

    def _report_inexact(self, *, left: int) -> None:
        if not left:
            raise ModelError(
                "the model's chat template renders answers differently in training and in chat "
                "(templates of reasoning models rewrite turns), so the loss mask cannot be "
                f"computed. Use a named template{self._fitting()}, or a chat template that marks "
                "answers with {% generation %}."
            )
        self._warn_once(
            "the model's chat template rewrites earlier turns, so only the turns that it renders "
            "as in chat are supervised. To supervise all turns, use a named template"
            f"{self._fitting()}, or a chat template that marks answers with {{% generation %}}."
        )

    def _fitting(self) -> str:
        """Suggest the named template whose tokens all occur in the output of this one."""
        turns = [{"role": role, "content": _PROBE} for role in ("user", "assistant", "user")]
        try:
            written = self._text(turns, prompt=True)[0]
        except DataError:
            written = self._source(())
        fits = {name: spec.tokens for name, spec in NAMED.items() if spec.tokens}
        fits = {n: tokens for n, tokens in fits.items() if all(t in written for t in tokens)}
        best = max(fits, key=lambda name: len("".join(fits[name])), default="")
        return f" that fits, such as '{best}'" if best else ""


def _reasoning_key(source: str) -> str:
    """The key under which a chat template reads reasoning."""
    keys = ("reasoning_content", "thinking", "reasoning")
    return next((key for key in keys if re.search(rf"[.'\"]{key}\b", source)), keys[0])


def _characters(value: Any) -> int:
    """About how many characters the template is given."""
    if isinstance(value, Mapping):
        return sum(_characters(key) + _characters(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_characters, value))
    return len(value) if isinstance(value, str) else 1
