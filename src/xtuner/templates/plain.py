"""Templates without markup: the model continues the text of the prompt, as in pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.calls.families.base import Family
from xtuner.errors import DataError
from xtuner.templates.base import USE_AUTO, Rendered, Template, hash_of, turn_at_end
from xtuner.templates.tool_layout import ToolLayout, needs_layout
from xtuner.types import Message


class PlainText(Template):
    """Messages are joined without markers; an answer ends with the EOS token.

    The text starts with the BOS token if the tokenizer adds one by default, as in pretraining on
    plain text.
    """

    name_of_kind = "plain"
    between = "\n"

    def __init__(self, tokenizer: Any, *, system: str = "") -> None:
        super().__init__(self.name_of_kind, tokenizer, system=system)
        end: str = tokenizer.eos_token or ""
        self._end = end if self.between else ""
        bos = tokenizer.bos_token_id
        adds = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        self._begin: str = tokenizer.bos_token if adds else ""
        self.stop_words = (end,) if end else ()
        self.stop_token_ids = self._token_ids([end])

    @property
    def markers(self) -> tuple[str, str, str]:
        """The strings at the start of the text, at the end of each answer, and after it."""
        return self._begin, self._end, self.between

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = False,
    ) -> Rendered:
        """Join the messages; every assistant turn ends with the EOS token and a line break."""
        text, turns = self._begin, []
        messages = self._with_system(messages)
        if needs_layout(messages, tools):
            self._refuse_tools()
        for role, content, message in ToolLayout.of().write_out(messages, tools):
            if message and message.reasoning:
                self._warn_of_reasoning(f"template '{self.name}'")
            start = len(text)
            text += content
            if role == "assistant" and message:
                text += self._end
                turns.append(turn_at_end(text, start, message))
                text += self.between
            elif role == "system":
                text += self.between
        return Rendered(text, turns)

    def _refuse_tools(self) -> None:
        """Raise DataError if this template does not support tools."""

    def fingerprint(self) -> str:
        """See `Template.fingerprint`."""
        return hash_of(self.name_of_kind, self._begin, self._end, self.system)


class Verbatim(PlainText):
    """Messages are concatenated as they are, without EOS; the data must contain all markup."""

    name_of_kind = "verbatim"
    between = ""

    @property
    def tool_family(self) -> Family | None:
        """See `Template.tool_family`: the data decide."""
        return None

    def _refuse_tools(self) -> None:
        raise DataError(f"template '{self.name}' does not render tool calls; {USE_AUTO}")
