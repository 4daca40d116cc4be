"""A conversation at the moments of a chat: what the model sees before each of its answers.

Chat templates that rewrite earlier turns render a turn of the assistant in one way while it is the
last, and in another way later. One text can then show only some turns as a chat does. `Moments`
renders the conversation up to each turn, so that every turn can be trained on after its own
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from xtuner.errors import DataError
from xtuner.templates.thoughts import (
    open_thought,
    split_thought,
    without_empty_thought,
    without_thought_at_end,
)

Dicts = list[dict[str, Any]]
PROBE = "\u2042xtuner\u2042"
"""Content with which no template begins an answer."""


class Text(NamedTuple):
    """A rendered text, and the character spans that ``{% generation %}`` marks in it."""

    text: str
    marks: list[tuple[int, int]]


Render = Callable[[Dicts, bool], Text]
"""From messages, and whether to append the generation prompt, to text."""


class Completion(NamedTuple):
    """A turn after its prompt, assembled because the template renders no such text.

    Attributes:
        prompt: What the chat shows.
        answer: What the model writes, including the stop.
        turn: The turn as the answer shows it; without its reasoning if this cannot follow the
            prompt.
        left_out: Whether reasoning is left out.
    """

    prompt: str
    answer: str
    turn: dict[str, Any]
    left_out: bool = False


class Moments:
    """The conversation `dicts`, rendered up to each turn of the assistant; each text once.

    Args:
        dicts: The messages, as the template takes them.
        render: Renders some of them.
        reasoning_key: The key of the reasoning of a turn.
        repaired: Replaces the text of a turn with calls, if they cannot be read in it.
    """

    def __init__(
        self,
        dicts: Dicts,
        render: Render,
        *,
        reasoning_key: str,
        repaired: Callable[[int, str], str] = lambda index, text: text,
    ) -> None:
        self.dicts = dicts
        self._render, self._key, self._repaired = render, reasoning_key, repaired
        self._before: dict[int, Text | None] = {}
        self._after: dict[int, Text] = {}

    def before(self, index: int) -> Text | None:
        """The prompt for turn `index`; None if the template rejects it."""
        if index not in self._before:
            try:
                self._before[index] = self._render(self.dicts[:index], True)
            except DataError:  # there is no user turn yet, but the template requires one
                self._before[index] = None
        return self._before[index]

    def prompt(self) -> Text:
        """The complete conversation with the generation prompt.

        Raises:
            DataError: The template rejects it.
        """
        return self._render(self.dicts, True)

    def after(self, index: int) -> Text:
        """The conversation that ends with turn `index`."""
        if index not in self._after:
            self._after[index] = self._render(self.dicts[: index + 1], False)
        return self._after[index]

    def completion(self, index: int, end_of: Callable[[str, int], int]) -> Completion | str:
        """Turn `index` after its prompt, if `after` does not begin with `before`.

        Prompts of reasoning models open a thought (``<think>``), or close an empty one, while the
        templates leave thoughts out of the turns that they render. The answer is then the reasoning
        of the turn and the end of the thought, if it is open, and what the template renders after
        the header of the turn.

        Args:
            index: Index of the turn.
            end_of: The end of the answer in a text in which it begins at a character.

        Returns:
            The completion, or why there is none.
        """
        before = self.before(index)
        if before is None:
            return "it renders no prompt for the turn"
        prompt, given = before.text, self.dicts[index]
        turn, reasoning = self._without_reasoning(index)
        parts = self._header_and_opener(index, turn["role"], prompt)
        if isinstance(parts, str):
            return parts
        header, opener = parts
        rendered = self._render([*self.dicts[:index], turn], False).text
        fits = rendered.startswith(header)
        answer = rendered[len(header) : end_of(rendered, len(header))] if fits else ""
        answer = self._repaired(index, answer)
        if not answer:
            return "it renders the turn differently from its prompt"
        tags = open_thought(opener)
        if tags is None:
            answer = without_empty_thought(answer) if opener else answer
            return Completion(prompt, answer, turn, left_out=bool(reasoning))
        if not reasoning and answer.lstrip().startswith(tags[1]):
            return Completion(prompt, answer.lstrip(), given)
        between = self._between(index, prompt, tags, opener)
        return Completion(prompt, reasoning + between + without_empty_thought(answer), given)

    def _without_reasoning(self, index: int) -> tuple[dict[str, Any], str]:
        """Turn `index` without its reasoning, and the reasoning."""
        turn = dict(self.dicts[index])
        reasoning = str(turn.pop(self._key, "") or "").strip()
        if not reasoning and isinstance(turn.get("content"), str):
            reasoning, turn["content"] = split_thought(turn["content"])
        return turn, reasoning

    def _header_and_opener(self, index: int, role: str, prompt: str) -> tuple[str, str] | str:
        """The text up to the answer of turn `index`, and what `prompt` opens in the answer; or why
        they are not known."""
        try:
            asked = self._render(self.dicts[:index], False).text
            plain = {"role": role, "content": PROBE}
            rendered = self._render([*self.dicts[:index], plain], False).text
        except DataError:
            return "it renders no answer without calls"
        rendered, found, _ = rendered.rpartition(PROBE)
        if not found or not prompt.startswith(asked):
            return "its prompt does not begin with the conversation"
        added = prompt[len(asked) :]
        header = without_thought_at_end(added)
        if not header:
            return without_thought_at_end(rendered), added
        before, found, _ = rendered.rpartition(header)
        if not found:
            return f"its prompt ends with {added!r}, which the rendered turn does not have"
        return before + header, added[len(header) :]

    def _between(self, index: int, prompt: str, tags: tuple[str, str], opener: str) -> str:
        """What the template writes between reasoning and content, or what models write."""
        turn = {"role": "assistant", "content": PROBE, self._key: PROBE}
        try:
            rendered = self._render([*self.dicts[:index], turn], False).text
        except DataError:
            rendered = ""
        parts = rendered[len(prompt) :].split(PROBE) if rendered.startswith(prompt) else []
        if len(parts) == 3 and not parts[0] and tags[1] in parts[1]:
            return parts[1]
        return f"\n{tags[1]}\n\n" if opener.endswith("\n") else tags[1]


def roles(dicts: Sequence[dict[str, Any]]) -> str:
    """The roles of messages, for error messages."""
    return ", ".join(turn["role"] for turn in dicts) or "none"
