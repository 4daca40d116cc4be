"""Rows of the data as questions to the model: the tokens before a row's first answer, and that
answer. Reports show a question as its user wrote it, without the template around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from xtuner.data.packing.pack import PackedDataset
from xtuner.errors import XTunerError
from xtuner.templates.base import Template
from xtuner.types import Message, Sample

MAX_TOKENS = 48
"""Number of tokens of an answer that are compared."""
FEWEST_PROMPT = 4
"""A sample that begins with its answer has no question."""
SMALL = 5_000
"""With more rows than this, a model is not expected to reproduce each answer."""
_MARK = "Qq"


@dataclass(frozen=True)
class AskedRow:
    """A row of the data as a question.

    Attributes:
        prompt, expected: Token ids before the row's first answer, and of that answer.
        row: The row's location.
        others: Other answers of the data to the same prompt.
    """

    prompt: list[int]
    expected: list[int]
    row: str
    others: tuple[tuple[int, ...], ...] = ()


def asked_rows(dataset: PackedDataset | None, number: int) -> list[AskedRow]:
    """`number` samples of `dataset`, from packs spread evenly over it, as questions."""
    if dataset is None or not number:
        return []
    picked = np.unique(np.linspace(0, len(dataset) - 1, num=min(2 * number, len(dataset))))
    found = (asked for i in picked for asked in map(asked_row, dataset[round(i)][:1]))
    rows = [row for row in found if row is not None]
    if len(rows) < number:
        others = (asked_row(s) for i in picked for s in dataset[round(i)][1:])
        rows += [row for row in others if row is not None]
    chosen = rows[:: max(1, len(rows) // number)][:number]
    return chosen if dataset.num_samples > SMALL else _with_others(dataset, chosen)


def _with_others(dataset: PackedDataset, rows: Sequence[AskedRow]) -> list[AskedRow]:
    """`rows` with the other answers of the data to the same prompts."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {tuple(r.prompt): set() for r in rows}
    for index in range(len(dataset)):
        for asked in filter(None, map(asked_row, dataset[index])):
            answers = found.get(tuple(asked.prompt))
            if answers is not None:
                answers.add(tuple(asked.expected))
    return [
        replace(row, others=tuple(sorted(found[tuple(row.prompt)] - {tuple(row.expected)})))
        for row in rows
    ]


def asked_row(sample: Sample) -> AskedRow | None:
    """Split `sample` into the tokens before its first answer and the answer; None for text without
    a question."""
    if sample.images or sample.lengths:
        return None
    supervised = np.flatnonzero(sample.loss_mask)
    if not len(supervised) or supervised[0] < FEWEST_PROMPT:
        return None
    start = int(supervised[0])
    rest = np.flatnonzero(~sample.loss_mask[start:])
    stop = start + int(rest[0]) if len(rest) else len(sample.loss_mask)
    ids = sample.input_ids.tolist()
    return AskedRow(ids[:start], ids[start : min(stop, start + MAX_TOKENS)], str(sample.row))


def question_reader(tokenizer: Any, template: Template) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes a prompt (token ids) to its last user message; to the whole
    prompt without special tokens if `template` does not show where that message is."""

    def decode(ids: Sequence[int], *, special: bool) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=not special))

    def around(*messages: Message) -> tuple[str, str]:
        """The text before and after the last message, a user's `_MARK`."""
        ids = template.prompt_ids([*messages, Message("user", _MARK)])
        before, _, after = decode(ids, special=True).rpartition(_MARK)
        return before, after

    try:
        start, end = around()
        later, _ = around(Message("user", "a"), Message("assistant", "b"))
    except XTunerError:
        return lambda ids: decode(ids, special=False)
    opening = _common_end(start, later)
    stops = [token for token in tokenizer.all_special_tokens if token]

    def read(ids: Sequence[int]) -> str:
        text = decode(ids, special=True)
        known = bool(end.strip()) and text.endswith(end)
        known = known or bool(opening.strip() and opening in text)
        if not known:
            return decode(ids, special=False)
        text = text.removesuffix(end).removeprefix(start)
        if opening.strip():
            text = text.rpartition(opening)[2]
        cuts = [text.find(stop) for stop in stops if text.find(stop) > 0]
        return text[: min(cuts, default=len(text))]

    return read


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    longest = min(len(one), len(other))
    size = next((n for n in range(longest) if one[-n - 1] != other[-n - 1]), longest)
    return one[len(one) - size :]
