"""Templates defined by a `Spec`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from xtuner import plugins
from xtuner.calls.families.base import Family
from xtuner.errors import DataError, ModelError
from xtuner.templates.base import Rendered, Template, Turn, hash_of, turn_at_end
from xtuner.templates.spec import Spec, fill
from xtuner.templates.tool_layout import ToolLayout
from xtuner.types import Message

_PIECES = (
    "start", "system", "system_in_user", "user", "assistant", "answer", "after", "stop", "further",
)  # fmt: skip


class NamedTemplate(Template):
    """Renders a conversation from the pieces of a `Spec`; contents keep their white space."""

    def __init__(self, name: str, tokenizer: Any, *, spec: Spec, system: str = "") -> None:
        super().__init__(name, tokenizer, system=system or spec.default_system)
        self._spec = _with_tokens(name, spec, tokenizer)
        self._layout = ToolLayout.of(spec.tool_calls, further_roles=bool(spec.further))
        stops = (self._spec.stop, *spec.stop_words)
        self.stop_words = tuple(dict.fromkeys(stops))
        self.stop_token_ids = self._token_ids((tokenizer.eos_token or "", *stops))
        self._warn_of_missing_tokens()

    @property
    def spec(self) -> Spec:
        """The pieces, with the tokenizer's BOS and EOS filled in."""
        return self._spec

    @property
    def tool_family(self) -> Family | None:
        """See `Template.tool_family`."""
        return self._layout.family

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = False,
    ) -> Rendered:
        """See `Template.render`."""
        spec = self._spec
        messages = self._with_system(messages)
        text = spec.start
        turns: list[Turn] = []
        system, rounds, closed = "", 0, False
        for index, (role, content, message) in enumerate(self._layout.write_out(messages, tools)):
            self._check(role, message, index)
            if role == "assistant" and message:
                text += spec.assistant
                start = len(text)
                text += fill(spec.answer, {"content": content})
                turns.append(turn_at_end(text, start, message))
                text += spec.after
                closed = True
                continue
            if role == "system" and spec.system_in_user:
                system = content
                continue
            values = {"content": content, "system": system, "round": str(rounds), "role": role}
            if role == "system":
                piece = spec.system
            elif role == "user":
                rounds += 1
                piece = spec.system_in_user if system else spec.user
                values["round"], system = str(rounds), ""
            else:
                piece = spec.further
            if spec.stop_opens_next and closed and piece.startswith(spec.stop):
                piece = piece[len(spec.stop) :]
            text += fill(piece, values)
            closed = False
        if system:
            raise DataError(
                f"template '{self.name}' does not support a system message without a user turn"
            )
        return Rendered(text + spec.assistant if prompt else text, turns)

    def as_fields(self) -> dict[str, Any]:
        """See `Template.as_fields`."""
        if not plugins.is_user_path(self.name):
            return {}
        values = asdict(self._spec)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in values.items()}

    def fingerprint(self) -> str:
        """See `Template.fingerprint`."""
        return hash_of("named", asdict(self._spec), self.system)

    def _check(self, role: str, message: Message | None, index: int) -> None:
        if message and message.reasoning:
            self._warn_of_reasoning(f"template '{self.name}'")
        if role == "system" and index and self._spec.system_in_user:
            raise DataError(f"template '{self.name}' supports a system message only at the start")

    def _warn_of_missing_tokens(self) -> None:
        tokens = dict.fromkeys((*self._spec.tokens, self._spec.stop))
        missing = [token for token in tokens if len(self._token_ids((token,))) != 1]
        if missing:
            are = "is not a token" if len(missing) == 1 else "are not tokens"
            self._warn_once(
                f"template '{self.name}': {', '.join(missing)} {are} of this model, so plain text "
                "is used instead. This works, but takes more tokens; "
                "prompt_template = 'default' needs no special tokens."
            )


def _with_tokens(name: str, spec: Spec, tokenizer: Any) -> Spec:
    """Fill the tokenizer's BOS and EOS into the pieces."""
    pieces = {piece: getattr(spec, piece) for piece in _PIECES}
    if any("{eos}" in text for text in pieces.values()) and not tokenizer.eos_token:
        raise ModelError(
            f"template '{name}' ends answers with the EOS token, but this tokenizer has none; "
            'add "eos_token" to its tokenizer_config.json'
        )
    values = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
    filled: dict[str, Any] = {piece: fill(text, values) for piece, text in pieces.items()}
    return replace(spec, **filled)
