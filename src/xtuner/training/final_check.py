"""Checks at the end of a run what the model has learned, by asking it rows of its data and everyday
questions.

    before the first step   everyday questions ─► answers
    at the end              rows of the data, everyday questions ─► one line, final_check.json

A low loss shows neither that the model gives the trained answers, nor that it still answers other
questions.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xtuner.config.schema import Settings
from xtuner.data.build import TrainingData
from xtuner.engine.hooks.base import BaseHook, Run
from xtuner.engine.working import LABEL, say, working
from xtuner.errors import XTunerError
from xtuner.training.asked import SMALL, AskedRow, asked_rows, question_reader
from xtuner.training.evaluate import SampleAnswers
from xtuner.training.languages import language_of

FILE_NAME = "final_check.json"
EVERYDAY_TOKENS = 24
SIMILAR = 0.6
"""An everyday answer counts as unchanged if this share of its characters reappears in order."""
NEAR = 0.8
"""An answer with this share of equal characters has the wording of the data."""
EVERYDAY = {
    "en": (
        "What is the capital of France?",
        "Name three fruits.",
        "How many days are in a week?",
    ),
    "zh": ("中国的首都是哪里？", "说出三种水果。", "一个星期有几天？"),
}

Continue = Callable[[Sequence[Sequence[int]], int], list[str]]
"""Returns greedy continuations of prompts (token ids), of at most the given number of tokens."""
Ask = Callable[[Sequence[str], int], list[str]]
"""Returns greedy answers to questions, of at most the given number of tokens."""


@dataclass
class Findings:
    """Questions and the model's answers; each answer is a dict as in final_check.json."""

    training: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    everyday: list[dict[str, Any]] = field(default_factory=list)

    def line(self) -> str:
        """The findings in a line; empty if nothing was asked."""
        parts = [
            _share(getattr(self, name), key, f"{name} answers {word}")
            for name, key, word in (
                ("training", "reproduced", "reproduced"),
                ("validation", "reproduced", "reproduced"),
                ("everyday", "unchanged", "unchanged"),
            )
        ]
        return "; ".join(filter(None, parts))

    @property
    def learned_few(self) -> bool:
        """Whether less than half of the training answers are reproduced."""
        return 2 * _count(self.training, "reproduced") < len(self.training)

    @property
    def only_wording(self) -> bool:
        """Whether most training answers that are not reproduced differ only in details."""
        missed = [each for each in self.training if not each["reproduced"]]
        near = [_likeness(each["answer"], each["expected"]) >= NEAR for each in missed]
        return 2 * sum(near) > len(near)

    @property
    def forgot(self) -> bool:
        """Whether less than half of the everyday answers are unchanged."""
        return 2 * _count(self.everyday, "unchanged") < len(self.everyday)


class FinalCheck(BaseHook):
    """Asks the questions at the end of a run.

    Args:
        rows: Rows of the training data.
        validation: Rows of the validation split.
        number_of_rows: Number of training rows.
        decode: Decodes token ids to text.
        question: Decodes a prompt to the question in it.
        proceed, ask: Generate with the model in training; collective calls if `sharded`.
        sharded: All processes ask together; otherwise only the main process does.
    """

    order = 12
    collective = True

    def __init__(
        self,
        rows: Sequence[AskedRow],
        validation: Sequence[AskedRow],
        *,
        number_of_rows: int,
        decode: Callable[[Sequence[int]], str],
        question: Callable[[Sequence[int]], str],
        proceed: Continue,
        ask: Ask,
        sharded: bool,
    ) -> None:
        self._rows, self._validation, self._number = rows, validation, number_of_rows
        self._decode, self._question = decode, question
        self._continue, self._ask = proceed, ask
        self._sharded = sharded
        self._before: list[str] = []
        self._lowest = float("inf")
        texts = " ".join(decode(row.expected) for row in rows)
        self._questions = EVERYDAY.get(language_of(texts), EVERYDAY["en"])

    def on_start(self, run: Run) -> None:
        """Ask the everyday questions before the first step."""
        if run.step == 0 and self._takes_part(run):
            status = working(run.console, f"Asking {len(self._questions)} everyday questions")
            with status, contextlib.suppress(XTunerError):  # the end of the run says why
                self._before = self._ask(self._questions, EVERYDAY_TOKENS)

    def on_step(self, run: Run) -> None:
        """Record the lowest validation loss."""
        self._lowest = min(self._lowest, run.scalars.get("val_loss", self._lowest))

    def on_end(self, run: Run) -> None:
        """Ask all questions, and report the findings and what to change."""
        if not self._takes_part(run):
            return
        try:
            with working(run.console, "Asking rows of the data and everyday questions"):
                findings = self._findings()
        except XTunerError as error:  # such as a context shorter than a question
            if run.is_main:
                say(run.console, f"Learned      not checked: {error}")
            return
        if not run.is_main:
            return
        say(run.console, f"Learned      {findings.line()}")
        for text in self._advice(findings, run):
            say(run.console, f"{'':{LABEL}}{text}")
        content = json.dumps(asdict(findings), ensure_ascii=False, indent=1)
        (run.log_dir / FILE_NAME).write_text(content + "\n", encoding="utf-8")

    def _takes_part(self, run: Run) -> bool:
        return self._sharded or run.is_main

    def _findings(self) -> Findings:
        rows = [*self._rows, *self._validation]
        answers_of = [answer for row in rows for answer in (row.expected, *row.others)]
        most = max(map(len, answers_of), default=0)
        answers = self._continue([row.prompt for row in rows], most + 1) if rows else []
        asked = [self._compared(row, answer) for row, answer in zip(rows, answers, strict=True)]
        after = self._ask(self._questions, EVERYDAY_TOKENS) if self._before else []
        everyday = [
            {"question": question, "before": old, "after": new, "unchanged": _alike(old, new)}
            for question, old, new in zip(self._questions, self._before, after, strict=False)
        ]
        count = len(self._rows)
        return Findings(asked[:count], asked[count:], everyday)

    def _compared(self, row: AskedRow, answer: str) -> dict[str, Any]:
        expected = _plain(self._decode(row.expected))
        wanted = [expected, *(_plain(self._decode(other)) for other in row.others)]
        same = any(_plain(answer)[: len(text)] == text for text in wanted)
        question = _plain(self._question(row.prompt))
        return {
            "row": row.row,
            "question": question,
            "expected": expected,
            "answer": _plain(answer),
            "reproduced": same,
        }

    def _advice(self, findings: Findings, run: Run) -> list[str]:
        """What to change, if anything."""
        s, texts = run.settings, []
        steps = run.counter.done(run.total_steps)
        by_steps = s.max_steps is not None and steps >= s.max_steps
        length = "max_steps" if by_steps else "max_epochs"
        length += f" (now {getattr(s, length)})"
        one_epoch = s.max_epochs == 1 and not by_steps
        shorter = f"set max_steps below {steps}" if one_epoch else f"lower {length}"
        if findings.learned_few and findings.training and self._number <= SMALL:
            texts.append(_few_learned(findings, f"raise {length} or lr (now {s.lr:g})"))
        if findings.forgot and findings.everyday:
            texts.append(
                "Most everyday answers changed: the model answers in the style of the data, or "
                "has forgotten what it knew. If that matters, add general conversations (data_path "
                f"takes a list), {shorter}, or lower lr (now {s.lr:g})."
            )
        last = run.scalars.get("val_loss")
        if last is not None and last > 1.05 * self._lowest:
            texts.append(
                f"The validation loss rose from {self._lowest:.3f} to {last:.3f}: the model "
                f"overfits. Add rows, or {shorter}."
            )
        return texts


def final_check(
    settings: Settings, data: TrainingData, asked: SampleAnswers
) -> tuple[FinalCheck, ...]:
    """Create the check of a run; None if it is disabled or the rows have no questions."""
    number = 0 if settings.has_vision else settings.evaluation_rows
    rows = asked_rows(data.train, number)
    if not rows:
        return ()
    check = FinalCheck(
        rows,
        asked_rows(data.validation, math.ceil(number / 2)),
        number_of_rows=data.train.num_samples,
        decode=lambda ids: str(asked.tokenizer.decode(ids, skip_special_tokens=True)),
        question=question_reader(asked.tokenizer, asked.template),
        proceed=asked.proceed,
        ask=asked.ask,
        sharded=asked.sharded,
    )
    return (check,)


def _count(found: Sequence[dict[str, Any]], key: str) -> int:
    return sum(bool(each[key]) for each in found)


def _share(found: Sequence[dict[str, Any]], key: str, words: str) -> str:
    return f"{_count(found, key)} of {len(found)} {words}" if found else ""


def _few_learned(findings: Findings, more: str) -> str:
    """What to change if few training answers are reproduced; `more`: what makes a run longer."""
    if findings.only_wording:
        return (
            "The answers have the wording of the data, but other details, such as numbers or "
            "names. Details that cannot be guessed are learned only by many repetitions: "
            f"{more}, or put them into the prompt."
        )
    return (
        f"Few training answers match the data word for word. To learn them, {more}; if other "
        "wordings are fine, judge by your own questions (evaluation_inputs)."
    )


def _alike(before: str, after: str) -> bool:
    """Whether two answers are nearly the same."""
    one, other = _plain(before), _plain(after)
    if not one or not other:
        return one == other
    length = min(len(one), len(other))  # a longer answer is not a different one
    return _likeness(one[:length], other[:length]) >= SIMILAR


def _likeness(one: str, other: str) -> float:
    """Share of equal characters."""
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _plain(text: str) -> str:
    return " ".join(text.split())
