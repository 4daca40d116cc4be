"""The base class of templates, which render conversations for training and prompts for chat.

A subclass renders messages to one string and locates the assistant turns in it (`Rendered`). Token
ids, loss mask and prompts are derived here for all templates, so that the prompt of a chat is
always an exact prefix of a training sequence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from xtuner.calls.families import DEFAULT
from xtuner.calls.families import load as load_family
from xtuner.calls.families.base import Family
from xtuner.templates.tokens import Tokens, tokens_of
from xtuner.types import Conversation, Encoded, Message

VERSION = 3
"""Part of every fingerprint; incremented when the ids or masks of any template change."""

USE_AUTO = (
    "use prompt_template = 'auto' with a model whose chat template supports them, "
    "or remove them from the data"
)

logger = logging.getLogger("xtuner.templates")


class Turn(NamedTuple):
    """An assistant turn, including its stop: characters ``[start, end)``; those of `masked` in it
    are not supervised. `weight` is the loss weight of its tokens."""

    start: int
    end: int
    supervised: bool
    masked: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0


class Rendered(NamedTuple):
    """The text of a conversation or prompt, and its assistant turns, in order."""

    text: str
    turns: list[Turn]


class Template(ABC):
    """Renders messages to token ids, a loss mask and prompts.

    Attributes:
        name: The value of the setting `prompt_template`.
        system: The system message of conversations that have none; may be empty.
        stop_words: Strings that end an answer.
        stop_token_ids: Token ids that end an answer, including the tokenizer's EOS token.
    """

    name: str
    system: str
    stop_words: tuple[str, ...]
    stop_token_ids: tuple[int, ...]

    def __init__(self, name: str, tokenizer: Any, *, system: str = "") -> None:
        self.name = name
        self.system = system
        self._tokens: Tokens = tokens_of(tokenizer)
        self._warned: set[str] = set()

    @abstractmethod
    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt: bool = False,
    ) -> Rendered:
        """Render messages to text.

        Args:
            tools: JSON schemas of the tools that the assistant may call.
            prompt: Append the generation prompt, which opens the next assistant turn.

        Raises:
            DataError: The template does not support these messages.
            ModelError: The assistant turns cannot be located exactly.
        """

    @property
    def tool_family(self) -> Family | None:
        """How the model writes tool calls with this template; None if that is not known."""
        return load_family(DEFAULT)

    def answer(self, text: str) -> Message:
        """The assistant turn with the generated `text`, as training data contain it."""
        return Message("assistant", text)

    def as_fields(self) -> dict[str, Any]:
        """The template as plain values if it is the user's own (a `Spec`); otherwise empty."""
        return {}

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of everything that affects rendering; part of the key of the data cache."""

    def encode(self, conversation: Conversation) -> Encoded:
        """Token ids, loss mask and loss weights of a conversation.

        The stop token of a supervised turn is supervised; what follows it, such as a line break,
        is not.

        Raises:
            DataError, ModelError: See `render`.
        """
        if not conversation.messages:
            return Encoded([], [])
        return self._encoded(self.render(conversation.messages, tools=conversation.tools))

    def sequences(self, conversation: Conversation) -> list[Encoded]:
        """The training sequences of a conversation; each supervised turn is supervised in one.

        Most templates need one sequence. A chat template that rewrites earlier turns needs several:
        each ends with a turn and is rendered as in a chat at that moment.

        Raises:
            DataError, ModelError: See `render`.
        """
        return [self.encode(conversation)]

    def _encoded(self, rendered: Rendered) -> Encoded:
        ids: list[int] = []
        mask: list[bool] = []
        weights: list[float] = []
        for index, segment in enumerate(self._segments(rendered)):
            turn = rendered.turns[index // 2] if index % 2 else None
            ids += segment
            weights += [turn.weight if turn else 1.0] * len(segment)
            if turn is not None and turn.supervised and turn.masked:
                mask += self._partly_masked(rendered.text, turn, segment)
            else:
                mask += [turn is not None and turn.supervised] * len(segment)
        weighted = any(turn.weight != 1.0 for turn in rendered.turns if turn.supervised)
        return Encoded(ids, mask, weights if weighted else None)

    def _partly_masked(self, text: str, turn: Turn, ids: list[int]) -> list[bool]:
        """Which of the `ids` of `turn` are supervised.

        They are compared with ids that are cut at the masked characters, so that the ids themselves
        do not depend on the mask; a token across such a cut is not supervised.
        """
        boundaries = [index for span in turn.masked for index in span]
        pieces = self._tokens.segments(text[: turn.end], [turn.start, *boundaries])[1:]
        cut = [token for piece in pieces for token in piece]
        learned = [index % 2 == 0 for index, piece in enumerate(pieces) for _ in piece]
        mask = [False] * len(ids)
        matcher = SequenceMatcher(None, ids, cut, autojunk=False)
        for start, other, size in matcher.get_matching_blocks():
            mask[start : start + size] = learned[other : other + size]
        return mask

    def prompt_ids(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Token ids up to and including the generation prompt.

        They are a prefix of the ids of the completed conversation.

        Raises:
            DataError, ModelError: See `render`.
        """
        return [
            i
            for segment in self._segments(self.render(messages, tools=tools, prompt=True))
            for i in segment
        ]

    def _segments(self, rendered: Rendered) -> list[list[int]]:
        cuts = [position for turn in rendered.turns for position in (turn.start, turn.end)]
        return self._tokens.segments(rendered.text, cuts)

    def _token_ids(self, texts: Sequence[str]) -> tuple[int, ...]:
        """Ids of those `texts` that are a single token."""
        segments = [self._tokens.segments(text, ())[0] for text in texts if text]
        return tuple(dict.fromkeys(ids[0] for ids in segments if len(ids) == 1))

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        """`messages` with the system message of this template, unless they have their own."""
        if self.system and not (messages and messages[0].role == "system"):
            return [Message("system", self.system), *messages]
        return messages

    def _warn_of_reasoning(self, template: str) -> None:
        """Warn that the reasoning of a turn is left out."""
        self._warn_once(
            f"{template} does not render reasoning_content, so it is not trained on. Use a model "
            "whose chat template renders it, or write it into the content, such as "
            "<think>...</think>"
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)


def turn_at_end(text: str, start: int, message: Message) -> Turn:
    """The turn of `message`, which begins at `start` and ends where `text` ends."""
    end = len(text)
    masked = masked_spans(message, text, start, end)
    return Turn(start, end, message.supervised, masked, message.weight)


def masked_spans(message: Message, text: str, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Where the thoughts of `message` are in ``text[start:end]``, if they are to be masked."""
    if not message.mask_thought:
        return ()
    found, at = [], start
    for thought in (message.reasoning, message.content if message.tool_calls else ""):
        shown = thought.strip()
        where = text.find(shown, at, end) if shown else -1
        if where >= 0:
            at = where + len(shown)
            found.append((where, at))
    return tuple(found)


def hash_of(*parts: Any) -> str:
    """Hash JSON-serializable values."""
    text = json.dumps([VERSION, *parts], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
