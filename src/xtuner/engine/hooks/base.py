"""What a hook sees and can override."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.engine.counting import Counter

Question = tuple[str, tuple[str, ...]]
"""The question's text and the names of its images."""


@dataclass
class Run:
    """The state of a run that hooks can read.

    Attributes:
        settings: The run's settings.
        work_dir: The folder of the checkpoints.
        log_dir: The time-stamped log folder of this start.
        console: The terminal; print through it to keep the progress bar intact.
        answer: Asks the model a question, with an image if one is named, and returns the answer.
            Only this process generates, unless weights are sharded.
        validate: Returns the mean loss on the validation split, a collective call; None without a
            split.
        step: Optimizer steps completed.
        total_steps: The step at which the run ends.
        start_step: The step at which the run started (not 0 after a resume).
        epoch: Completed passes over the data, as a fraction.
        scalars: The numbers of the last step; a hook can add to them in `on_step`.
        counter: Counts in the unit of the setting `steps_are`.
        count: The number in the name of the checkpoint that is being saved, in that unit.
        is_main: Whether this is the main process, the only one that writes files.
        ask_all: See `answers`.
    """

    settings: Settings
    work_dir: Path
    log_dir: Path
    console: Console
    answer: Callable[..., str]
    validate: Callable[[], float] | None
    total_steps: int
    start_step: int = 0
    step: int = 0
    epoch: float = 0.0
    scalars: dict[str, float] = field(default_factory=dict)
    counter: Counter = field(default_factory=Counter)
    count: int = 0
    is_main: bool = True
    ask_all: Callable[[Sequence[Question]], list[str]] | None = None

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The answers to `questions`, in order. A collective call; processes split the work if each
        holds the entire model."""
        if self.ask_all is not None:
            return self.ask_all(questions)
        return [self.answer(question, *images) for question, images in questions]


class BaseHook:
    """A hook that does nothing; override what you need.

    Hooks with a lower `order` run first.

    Attributes:
        records: The hook writes the numbers of a step. It runs after all hooks that do not, so that
            it sees what they add to `run.scalars`.
        collective: The hook runs on every process and may make collective calls: `run.validate`,
            `run.answers`, a forward pass of sharded weights. It writes files only if
            ``run.is_main``. Other hooks run only on the main process.
    """

    order = 50
    records = False
    collective = False

    def wanted(self, run: Run) -> bool:
        """Whether the run's settings enable the hook."""
        return True

    def on_start(self, run: Run) -> None:
        """Called once before the first step."""

    def on_step(self, run: Run) -> None:
        """Called after every optimizer step, when `run.scalars` holds its numbers."""

    def on_end(self, run: Run) -> None:
        """Called after the last step of a run that was not interrupted."""

    def close(self) -> None:
        """Always called at the end, even after an error or an interruption."""


def make_hooks(run: Run, *, custom: Sequence[str], folder: Path) -> list[BaseHook]:
    """Create all built-in and custom hooks that are active in this run.

    Args:
        run: The run. Outside the main process only collective hooks are created.
        custom: The setting `custom_hooks`.
        folder: The folder in which relative paths of `custom` are looked up first.

    Raises:
        ConfigError: A custom hook cannot be loaded or is not a hook.
    """
    package = "xtuner.engine.hooks"
    classes = [importlib.import_module(f"{package}.{name}").Hook for name in plugins.names(package)]
    classes += custom_classes(custom, folder=folder)
    here = [kind for kind in classes if run.is_main or kind.collective]
    return [hook for hook in (kind() for kind in here) if hook.wanted(run)]


def custom_classes(custom: Sequence[str], *, folder: Path) -> list[type[BaseHook]]:
    """The classes that the setting `custom_hooks` names; see `make_hooks`."""
    return [
        plugins.load_user_class(name, BaseHook, setting="custom_hooks", folder=folder)
        for name in custom
    ]


def numbers(scalars: Mapping[str, float], keys: Sequence[str]) -> str:
    """``key value`` pairs for a log line, leaving out keys that are missing."""
    styles: dict[str, Any] = {"lr": ".3g", "loss": ".4f", "grad_norm": ".3f", "val_loss": ".4f"}
    return "  ".join(f"{k} {scalars[k]:{styles.get(k, ',.0f')}}" for k in keys if k in scalars)
