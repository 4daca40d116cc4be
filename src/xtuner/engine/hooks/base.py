"""What a hook sees and may override."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.engine.counting import Counter
from xtuner.errors import ConfigError

Question = tuple[str, tuple[str, ...]]
"""A text, and the names of the images that it is about."""


@dataclass
class Run:
    """The state of a run that hooks may read.

    Attributes:
        settings: of the run.
        work_dir: where checkpoints go.
        log_dir: the time-stamped folder of this start.
        console: the terminal; print through it, so that the progress bar stays whole.
        answer: asks the model a question, and about an image if one is named, and returns its
            answer; this process alone answers, unless weights are sharded.
        validate: mean loss on the validation split, measured by all processes together; None
            without a split.
        step: optimizer steps done.
        total_steps: at which the run ends.
        start_step: at which it started (not 0 after a resume).
        epoch: how often the data was gone through, a fraction.
        scalars: the numbers of the last step; a hook may add to them in `on_step`.
        counter: counts in the unit of the setting `steps_are`.
        count: what the checkpoint that is being saved is named by, in that unit.
        is_main: whether this is the main process, which alone writes files.
        ask_all: see `answers`.
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
        """The answers to `questions`, in order. All processes ask together, and share the work
        where each holds the whole model."""
        if self.ask_all is not None:
            return self.ask_all(questions)
        return [self.answer(question, *images) for question, images in questions]


class BaseHook:
    """A hook that does nothing; override what you need.

    Hooks with a lower `order` run first.

    Attributes:
        records: the hook writes the numbers of a step; it runs after all that do not, so that it
            sees what they add to `run.scalars`.
        collective: the hook runs on every process, and may call what all processes call together:
            `run.validate`, `run.answers`, a forward pass of sharded weights. It writes files on
            ``run.is_main`` only. Other hooks run on the main process alone.
    """

    order = 50
    records = False
    collective = False

    def wanted(self, run: Run) -> bool:
        """Whether the settings of this run ask for the hook."""
        return True

    def on_start(self, run: Run) -> None:
        """Called once before the first step."""

    def on_step(self, run: Run) -> None:
        """Called after every optimizer step, when `run.scalars` holds its numbers."""

    def on_end(self, run: Run) -> None:
        """Called after the last step of a run that was not interrupted."""

    def close(self) -> None:
        """Called always at the end, also after an error or an interruption."""


def make_hooks(run: Run, *, custom: Sequence[str], folder: Path) -> list[BaseHook]:
    """Make every hook of this package, and the user's, that wants this run.

    Args:
        run: the run they will watch; on all processes but the main one only collective hooks are
            made.
        custom: the setting `custom_hooks`.
        folder: where relative paths in `custom` are looked up first.

    Raises:
        ConfigError: a custom hook cannot be loaded or is no hook.
    """
    package = "xtuner.engine.hooks"
    classes = [importlib.import_module(f"{package}.{name}").Hook for name in plugins.names(package)]
    for name in custom:
        kind = plugins.load_user_object(name, setting="custom_hooks", folder=folder)
        if not (inspect.isclass(kind) and issubclass(kind, BaseHook)):
            raise ConfigError(
                f"custom_hooks: {name!r} is not a subclass of xtuner.engine.hooks.base.BaseHook"
            )
        classes.append(kind)
    here = [kind for kind in classes if run.is_main or kind.collective]
    return [hook for hook in (kind() for kind in here) if hook.wanted(run)]


def numbers(scalars: Mapping[str, float], keys: Sequence[str]) -> str:
    """``key value`` pairs for a log line, leaving out keys that are missing."""
    styles: dict[str, Any] = {"lr": ".3g", "loss": ".4f", "grad_norm": ".3f", "val_loss": ".4f"}
    return "  ".join(f"{k} {scalars[k]:{styles.get(k, ',.0f')}}" for k in keys if k in scalars)
