"""Ask the evaluation questions before, during and after training; show and keep the answers."""

from __future__ import annotations

from rich.markup import escape

from xtuner.engine.hooks.base import BaseHook, Run


class Hook(BaseHook):
    """Writes ``eval_outputs_iter_N.txt`` and measures the validation loss."""

    order = 10

    def __init__(self) -> None:
        self._done_at = -1

    def wanted(self, run: Run) -> bool:
        """With questions or with a validation split."""
        return bool(run.settings.evaluation_inputs) or run.validate is not None

    def on_start(self, run: Run) -> None:
        """Ask the model as it is before the first step."""
        if run.step == 0:
            self._evaluate(run, "before training")

    def on_step(self, run: Run) -> None:
        """Ask every `evaluation_freq` steps."""
        due = run.counter.due(run.step, run.settings.evaluation_freq)
        if due and run.step < run.total_steps:
            at = f"step {run.step}" if due == run.step else f"micro-batch {due}, step {run.step}"
            self._evaluate(run, f"after {at}", count=due)

    def on_end(self, run: Run) -> None:
        """Ask the finished model."""
        self._evaluate(run, f"after training (step {run.step})")

    def _evaluate(self, run: Run, when: str, *, count: int | None = None) -> None:
        if self._done_at == run.step:
            return
        self._done_at = run.step
        if run.validate is not None:
            run.scalars["val_loss"] = run.validate()
            run.console.print(f"Validation loss {when}: {run.scalars['val_loss']:.4f}")
        if not run.settings.evaluation_inputs:
            return
        run.console.print(f"\n[bold]Sample answers {when}[/bold]")
        lines = [f"Sample answers {when}", ""]
        settings = run.settings
        images = settings.evaluation_images or ("",)
        images = images * (len(settings.evaluation_inputs) if len(images) == 1 else 1)
        for question, image in zip(settings.evaluation_inputs, images, strict=True):
            answer = run.answer(question, image) if image else run.answer(question)
            shown = f"  [magenta]Image[/magenta] {escape(image)}\n" if image else ""
            run.console.print(
                f"{shown}  [cyan]Q[/cyan] {escape(question)}\n  [green]A[/green] {escape(answer)}\n"
            )
            lines += [*([f"Image: {image}"] if image else []), f"Q: {question}", f"A: {answer}", ""]
        number = run.counter.done(run.step) if count is None else count
        file = run.log_dir / f"eval_outputs_iter_{number}.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
