"""Find the assistant turns of a conversation in the texts that a chat template renders.

A turn is found in a text if the text shows it as a chat does: it begins with the prompt that the
chat shows before the turn, and the turn itself is the one rendered after that prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtuner.templates.base import Rendered, Turn, masked_spans
from xtuner.templates.moments import Moments, Text
from xtuner.templates.thoughts import open_thought
from xtuner.types import Message

_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class Stops:
    """What ends an answer.

    Attributes:
        text: What the template writes after an answer; may be empty.
        openers: The tokens that open the next turn, by role, if they end an answer.
    """

    text: str
    openers: Mapping[str, str] = field(default_factory=dict)

    def end_of(self, turn: str, start: int) -> int:
        """The end of the stop in `turn`, which ends with an answer that begins at `start`."""
        at = turn.rfind(self.text, start) if self.text else -1
        return at + len(self.text) if at >= 0 else start + len(turn[start:].rstrip())

    def marked_turn(self, text: str, mark: tuple[int, int]) -> str:
        """`text` up to the end of a marked turn, including a stop right after the mark."""
        end = mark[1]
        if self.text and self.text not in text[mark[0] : end]:
            gap = len(text) - end - len(text[end:].lstrip())
            if text.startswith(self.text, end + gap):
                end += gap + len(self.text)
        return text[:end]

    def opened(self, rendered: Rendered, last: Mapping[str, Any] | None) -> Rendered:
        """`rendered` with the opener of the next turn as the end of each answer.

        Args:
            rendered: A text and its turns.
            last: The turn with which the text ends, if it is one of the assistant.
        """
        text, turns = rendered
        if not self.openers or not turns:
            return rendered
        if last is not None and turns[-1].end == len(text):
            following = "tool" if last.get("tool_calls") else "user"
            text += self.openers.get(following, self.openers["user"])
        ended = []
        for turn in turns:
            rest = text[turn.end :]
            space = len(rest) - len(rest.lstrip())
            opener = next((o for o in self.openers.values() if rest[space:].startswith(o)), "")
            ended.append(turn._replace(end=turn.end + (space + len(opener) if opener else 0)))
        return Rendered(text, ended)


class TurnFinder:
    """The turns of one conversation.

    Args:
        moments: Renders the conversation up to each turn.
        messages: The message that each turn of `moments` shows; None for a turn of the template.
        stops: What ends an answer.
        has_tools: Whether tools are shown.
        repaired: Replaces the text of a turn with calls, if they cannot be read in it.
        check: Called with each turn that is found and its text.
    """

    def __init__(
        self,
        moments: Moments,
        messages: Sequence[Message | None],
        *,
        stops: Stops,
        has_tools: bool,
        repaired: Callable[[int, str], str],
        check: Callable[[Mapping[str, Any], str], None],
    ) -> None:
        self._moments, self._messages, self._stops = moments, messages, stops
        self._has_tools, self._repaired, self._check = has_tools, repaired, check
        self.dropped_reasoning = False
        """Whether a prompt closes the thought before a turn that has one."""

    def complete(self) -> Rendered:
        """The complete conversation, and the turns that are found in it."""
        count = len(self._messages)
        text = self._moments.after(count - 1)
        return self._opened(text, list(self._found(text, count).values()), count - 1)

    def prompt(self) -> Rendered:
        """The conversation with the generation prompt.

        Raises:
            DataError: The template rejects it.
        """
        text = self._moments.prompt()
        turns = list(self._found(text, len(self._messages)).values())
        return self._stops.opened(Rendered(text.text, turns), None)

    def renderings(self) -> tuple[list[Rendered], list[str]]:
        """Texts that together supervise each turn once, and why some turns are in none.

        The first text is the complete conversation, if a turn is found in it. Each of the others
        ends with the last turn that is still missing.
        """
        count = len(self._messages)
        missing = {i for i in range(count) if self._is_supervised(i)}
        texts: list[Rendered] = []
        reasons: list[str] = []
        end = count - 1
        while True:
            text = self._moments.after(end)
            found = self._found(text, end + 1)
            learned = missing & found.keys()
            if end in missing - learned and self._is_asked(end):
                completed = self._completed(end)
                if isinstance(completed, str):
                    reasons.append(completed)
                else:
                    texts.append(completed)
                missing.remove(end)
            if learned:
                turns = [t._replace(supervised=i in learned) for i, t in found.items()]
                texts.append(self._opened(text, turns, end))
            missing -= learned
            asked = [i for i in missing if self._is_asked(i)]
            if not asked:
                return texts or [self.complete()], reasons
            end = max(asked)

    def _is_asked(self, index: int) -> bool:
        """Whether a turn of the user precedes turn `index`."""
        return any(turn["role"] == "user" for turn in self._moments.dicts[:index])

    def _is_supervised(self, index: int) -> bool:
        message = self._messages[index]
        is_turn = self._moments.dicts[index]["role"] == "assistant"
        return is_turn and message is not None and message.supervised

    def _opened(self, text: Text, turns: list[Turn], end: int) -> Rendered:
        """`text`, which ends with turn `end`, with the openers that end answers."""
        last = self._moments.dicts[end]
        is_answer = last["role"] == "assistant"
        return self._stops.opened(Rendered(text.text, turns), last if is_answer else None)

    def _found(self, text: Text, count: int) -> dict[int, Turn]:
        """The turns that are found in `text`, which shows the first `count`, by their numbers."""
        answers = [i for i in range(count) if self._moments.dicts[i]["role"] == "assistant"]
        marks = text.marks if len(text.marks) == len(answers) else [None] * len(answers)
        found = {}
        for index, mark in zip(answers, marks, strict=True):
            span = self._span(text.text, index, mark)
            if span is None:
                continue
            message, masked = self._messages[index], []
            if mark is not None and span[0] < mark[0]:
                masked.append((span[0], mark[0]))
            if message is not None:
                masked += masked_spans(message, text.text, *span)
            weight = message.weight if message else 1.0
            found[index] = Turn(*span, self._is_supervised(index), tuple(masked), weight)
        return found

    def _span(self, text: str, index: int, mark: tuple[int, int] | None) -> tuple[int, int] | None:
        """Start and end of turn `index` in `text`; None if a chat renders it differently."""
        before = self._moments.before(index)
        if before is None and mark is None:
            return None
        start = len(before.text) if before is not None else mark[0] if mark else 0
        if before is not None and not text.startswith(before.text):
            return None
        if mark is not None:
            if start > mark[1]:
                return None
            end = self._stops.end_of(self._stops.marked_turn(text, mark), start)
        else:
            turn = self._moments.after(index).text
            end = self._stops.end_of(turn, start)
            if text[:end] != turn[:end] and (
                self._has_tools or "tool_calls" in self._moments.dicts[index]
            ):
                # Qwen 3 opens the last turn alone with an empty thought
                turn = turn[:start] + _EMPTY_THOUGHT.sub("", turn[start:], count=1)
                end = self._stops.end_of(turn, start)
            if text[:end] != turn[:end]:
                return None
        tags = open_thought(text[:start])
        if tags is not None and tags[1] not in text[start:end]:
            return None
        if self._repaired(index, text[start:end]) != text[start:end]:
            return None
        self._check(self._moments.dicts[index], text[start:end])
        return start, end

    def _completed(self, index: int) -> Rendered | str:
        """Turn `index` after its prompt, or why this is not possible."""
        completion = self._moments.completion(index, self._stops.end_of)
        if isinstance(completion, str):
            return completion
        self.dropped_reasoning |= completion.left_out
        prompt = self._moments.before(index)
        assert prompt is not None
        text = completion.prompt + completion.answer
        earlier = self._found(prompt, index).values()
        span = (len(completion.prompt), len(text))
        message = self._messages[index]
        masked = masked_spans(message, text, *span) if message else ()
        weight = message.weight if message else 1.0
        turns = [
            *(turn._replace(supervised=False) for turn in earlier),
            Turn(*span, True, masked, weight),
        ]
        self._check(completion.turn, completion.answer)
        return self._stops.opened(Rendered(text, turns), self._moments.dicts[index])
