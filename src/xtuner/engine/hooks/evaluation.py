"""Asks the evaluation questions before, during and after training; prints and saves the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.markup import escape

from xtuner.data.report.show_tokens import visible
from xtuner.engine.hooks.base import BaseHook, Question, Run
from xtuner.engine.working import fitted, working

ANSWERS_FILE = "sample_answers.jsonl"
"""One line per evaluation: step, time, and for each answer its question, images and text."""


class Hook(BaseHook):
    """Writes ``eval_outputs_iter_N.txt`` and ``sample_answers.jsonl``, and measures the validation
    loss."""

    order = 10
    collective = True

    def __init__(self) -> None:
        self._done_at = -1

    def wanted(self, run: Run) -> bool:
        """Whether there are questions or a validation split."""
        return bool(run.settings.evaluation_inputs) or run.validate is not None

    def on_start(self, run: Run) -> None:
        """Ask the questions before the first step."""
        if run.step == 0:
            self._evaluate(run, "before training")

    def on_step(self, run: Run) -> None:
        """Ask the questions every `evaluation_freq` steps."""
        due = run.counter.due(run.step, run.settings.evaluation_freq)
        if due and run.step < run.total_steps:
            at = f"step {run.step}" if due == run.step else f"micro-batch {due}, step {run.step}"
            self._evaluate(run, f"after {at}", count=due)

    def on_end(self, run: Run) -> None:
        """Ask the questions after the last step."""
        self._evaluate(run, f"after training (step {run.step})")

    def _evaluate(self, run: Run, when: str, *, count: int | None = None) -> None:
        if self._done_at == run.step:
            return
        self._done_at = run.step
        if run.validate is not None:
            with working(run.console, "Measuring the validation loss"):
                run.scalars["val_loss"] = run.validate()
            run.console.print(f"Validation loss {when}: {run.scalars['val_loss']:.4f}")
        if not run.settings.evaluation_inputs:
            return
        questions = _questions(run)
        with working(run.console, f"Asking {_counted(len(questions))}"):
            answers = run.answers(questions)
        if not run.is_main:
            return
        run.console.print(f"\n[bold]Sample answers {when}[/bold]")
        lines = [f"Sample answers {when}", ""]
        for (question, images), answer in zip(questions, answers, strict=True):
            shown = "".join(f"  [magenta]Image[/magenta] {escape(name)}\n" for name in images)
            asked, said = (
                escape(fitted(run.console, f"  {mark} {text}", indent=4))[3:]
                for mark, text in (("Q", question), ("A", visible(answer)))
            )
            run.console.print(
                f"{shown}  [cyan]Q[/cyan]{asked}\n  [green]A[/green]{said}\n", soft_wrap=True
            )
            lines += [*(f"Image: {name}" for name in images), f"Q: {question}", f"A: {answer}", ""]
        number = run.counter.done(run.step) if count is None else count
        file = run.log_dir / f"eval_outputs_iter_{number}.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        _append(run, when, questions, answers)


def _append(run: Run, when: str, questions: Sequence[Question], answers: Sequence[str]) -> None:
    """Append the answers to ``sample_answers.jsonl``."""
    rows = [
        {"question": question, "images": list(images), "answer": answer}
        for (question, images), answer in zip(questions, answers, strict=True)
    ]
    line = json.dumps({"step": run.step, "when": when, "answers": rows}, ensure_ascii=False)
    with (run.log_dir / ANSWERS_FILE).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _counted(number: int) -> str:
    return "1 question" if number == 1 else f"{number} questions, all at once"


def _questions(run: Run) -> list[Question]:
    """The questions in the settings, each with its image if there is one."""
    inputs = run.settings.evaluation_inputs
    images = run.settings.evaluation_images or ("",)
    images = images * (len(inputs) if len(images) == 1 else 1)
    return [(text, (image,) if image else ()) for text, image in zip(inputs, images, strict=True)]
