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
from typing import Any

from xtuner.errors import DataError, ModelError
from xtuner.templates.base import NO_REASONING, Rendered, Template, Turn, hash_of
from xtuner.templates.bounds import OutOfBoundsError, bounded, check_output
from xtuner.templates.table import NAMED
from xtuner.types import Message

Tools = Sequence[Mapping[str, Any]]

_PROBE = "xtuner"
_EXCEEDS = "the tokenizer's chat template exceeds"
_NAME_ANOTHER = "name another, such as prompt_template = 'chatml'"
_PATIENCE = 3
"""So many conversations may exceed the bounds before the template is not rendered any more."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
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
        self._tools_shown: bool | None = None
        self._exceeded = 0
        self._marked: dict[str, bool] = {}
        self._variables = {"date_string": _DATE} if "date_string" in self._source(()) else {}
        self._reasoning_key = _reasoning_key(self._source(()))
        self._has_system_turn = self._shows_system()
        self._stop = self._find_stop()
        self.stop_words = (self._stop,) if self._stop else ()
        ends = [t for t in _FURTHER_ENDS if t in self._source(()) and t in self._added]
        self.stop_token_ids = self._token_ids((tokenizer.eos_token or "", self._stop, *ends))

    def render(
        self, messages: Sequence[Message], *, tools: Tools = (), prompt: bool = False
    ) -> Rendered:
        """See `Template.render`."""
        turns = self._as_turns(messages)
        dicts = [turn for turn, _ in turns]
        text, marks = self._text(dicts, tools, prompt=prompt)
        if tools:
            self._check_tools(dicts, tools, text, prompt=prompt)
        answers = [i for i, turn in enumerate(dicts) if turn["role"] == "assistant"]
        bounds = marks if len(marks) == len(answers) else [None] * len(answers)
        found: list[Turn] = []
        inexact = 0
        for index, mark in zip(answers, bounds, strict=True):
            message = turns[index][1]
            supervised = message is not None and message.supervised
            span = self._span(text, dicts, index, tools, mark=mark, prompt=prompt)
            if span is not None:
                found.append(Turn(*span, supervised))
            elif supervised and any(turn["role"] == "user" for turn in dicts[:index]):
                inexact += 1
        if inexact and not prompt:
            self._report_inexact(left=sum(turn.supervised for turn in found))
        return Rendered(text, found)

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

    def _as_turns(self, messages: Sequence[Message]) -> list[tuple[dict[str, Any], Message | None]]:
        """The messages as dicts, with the system message where the template accepts it."""
        turns: list[tuple[dict[str, Any], Message | None]] = [
            (self._named_reasoning(m.as_dict()), m) for m in messages
        ]
        first = turns[0][0] if turns else None
        if self.system and first is not None and first["role"] != "system":
            turns.insert(0, ({"role": "system", "content": self.system}, None))
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
        if not tail.strip():
            self._warn_once(
                "the model's chat template writes nothing after an answer, so training cannot "
                "teach the model to stop; set prompt_template to a named template"
                f"{self._fitting()}"
            )
        return tail.strip()

    def _check_tools(
        self, dicts: list[dict[str, Any]], tools: Tools, text: str, *, prompt: bool
    ) -> None:
        if self._tools_shown is None:
            self._tools_shown = text != self._text(dicts, prompt=prompt)[0]
        if not self._tools_shown:
            self._warn_once(
                "the model's chat template does not render tools, so the 'tools' of the data have "
                "no effect; use a model whose template supports tools"
            )

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
