"""The public API: what the command line does, for scripts and notebooks.

    load_settings ──► train ──► TrainResult ──► load_chat ──► Chat.ask

Errors are raised as `XTunerError`; nothing here exits the process. This module imports neither
torch nor transformers before a function needs them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from xtuner.config import load
from xtuner.config.load import LoadedSettings
from xtuner.errors import ConfigError, LaunchError, XTunerError, did_you_mean
from xtuner.training.result import TrainResult as TrainResult

if TYPE_CHECKING:
    from xtuner.chat.session import Session
    from xtuner.generation.generate import GenerationOptions
    from xtuner.types import Message

_training = threading.Lock()
_groups_left: list[str] = []
"""Ranks of this process in process groups of earlier runs; torch cannot join one again."""

_ARGUMENTS = {
    "`--resume auto`": 'resume="auto"',
    "--resume": "resume=True",
    "--overwrite": "overwrite=True",
    "--wait": "wait=True",
    "--work-dir DIR": "work_dir=DIR",
    "--work-dir": "work_dir",
}
"""Options of `xtuner train` and the arguments of `train`; the former are in messages."""

Config = str | Path | Mapping[str, Any]


class TrainInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C or SIGTERM, after the last finished step was saved.

    Attributes:
        result: The state of the run; `resume=True` continues it if `result.checkpoint` is not None.
    """

    def __init__(self, message: str, result: TrainResult) -> None:
        super().__init__(message)
        self.result = result


def load_settings(config: Config, /, **overrides: Any) -> LoadedSettings:
    """Load and check settings.

    The settings are trusted like those on the command line: Python files that they name are
    imported and run, and ``trust_remote_code = True`` needs no flag (docs/security.md).

    Args:
        config: A settings file, the name of built-in settings, or a dictionary of settings.
        overrides: Settings that replace those of `config`.

    Returns:
        The checked settings in `.settings`, with their name and folder. They are frozen.

    Raises:
        ConfigError: There is no such file or name, or settings are wrong; all problems are listed.
    """
    return load.load_settings(config, overrides=overrides)


def train(
    config: Config | LoadedSettings,
    /,
    *,
    work_dir: str | Path | None = None,
    resume: bool | str = False,
    overwrite: bool = False,
    wait: bool = False,
    **overrides: Any,
) -> TrainResult:
    """Train a model.

    In the main thread, Ctrl-C and SIGTERM end the run after the current step is saved; the signal
    handlers of the caller are restored afterwards. In any other thread signals are left alone.
    `config` is trusted, as in `load_settings`.

    Args:
        config: What `load_settings` accepts or returns.
        work_dir: Folder of the results; overrides the setting.
        resume: True continues from the newest checkpoint in the work dir, 'iter_N' from that one;
            'auto' starts from the beginning if there is none.
        overwrite: Delete the checkpoints of an earlier run in the work dir.
        wait: Wait while another run writes to the work dir; False is an error then.
        overrides: Settings that replace those of `config`.

    Raises:
        XTunerError: The settings, data, model or machine do not allow the run, another run writes
            to the work dir, or the run cannot continue.
        TrainInterrupted: After Ctrl-C or SIGTERM; a `KeyboardInterrupt`.
    """
    if resume and overwrite:
        raise ConfigError("resume and overwrite: one keeps what the other deletes; give one")
    if not isinstance(config, LoadedSettings):
        loaded = load_settings(config, **overrides)
    elif overrides:
        raise ConfigError(f"{', '.join(overrides)}: these settings are loaded already; give "
                          "overrides to load_settings")  # fmt: skip
    else:
        loaded = config
    from xtuner.device.environment import set_up_memory, set_up_threads

    set_up_threads()
    set_up_memory(loaded.settings.device)

    from xtuner.engine.signals import Interrupted
    from xtuner.hub import trust
    from xtuner.training import run

    folder = loaded.work_dir(work_dir)
    trust.remember("work_dirs", str(folder.resolve()))
    which = "last" if resume is True else resume or None
    with _only_training(), _process_restored():
        try:
            return run.train(loaded, work_dir=folder, resume=which, overwrite=overwrite, wait=wait)
        except Interrupted as stopped:
            result = _result(folder, keep_best=loaded.settings.keep_best)
            raise TrainInterrupted(str(stopped), result) from None
        except XTunerError as error:
            error.args = (_as_arguments(str(error)),)
            raise


def _as_arguments(message: str) -> str:
    """`message` with the arguments of `train` in place of the options of the command line."""
    for option, argument in _ARGUMENTS.items():
        message = re.sub(rf"(?<![\w-]){option}(?![\w-])", argument, message)
    return message


class Chat:
    """A conversation with a model; every question and answer is added to its history.

    Created by `load_chat`.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def ask(self, question: str, *, images: Sequence[str | Path] = (), **options: Any) -> str:
        """Return the answer to `question`.

        Args:
            question: The user's text.
            images: Files or URLs that the question is about; needs a model with image input.
            options: Fields of `GenerationOptions`, for this answer only.

        Raises:
            XTunerError: The question is too long, or an image or option cannot be used; the
                history then stays as it was.
        """
        return "".join(self.stream(question, images=images, **options))

    def stream(
        self, question: str, *, images: Sequence[str | Path] = (), **options: Any
    ) -> Iterator[str]:
        """Yield the answer to `question` in pieces; arguments and errors as for `ask`.

        Closing the iterator ends the answer; the history keeps the part generated so far.
        """
        session, before = self._session, self._session.options
        chosen = _options(before, options)

        def pieces() -> Iterator[str]:
            session.options = chosen
            try:
                with contextlib.closing(session.ask(question, [str(i) for i in images])) as answer:
                    yield from answer
            finally:
                session.options = before

        return pieces()

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far, without the system message."""
        return tuple(self._session.messages)

    def reset(self) -> None:
        """Clear the conversation."""
        self._session.reset()


def load_chat(
    model: str | Path,
    /,
    *,
    adapter: str | Path | None = None,
    prompt_template: str | None = None,
    system: str | None = None,
    bits: Literal[4, 8, 16] | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    trust_code: bool = False,
    **options: Any,
) -> Chat:
    """Load a model for a conversation.

    Args:
        model: A checkpoint, a work dir (its newest checkpoint), an adapter, a model folder, or a
            name on the hub. Checkpoints record base model, template and system message.
        adapter: Folder of an adapter to load on `model`.
        prompt_template: Replaces the template that the checkpoint names.
        system: Replaces the system message that the checkpoint names.
        bits: Bits per weight; None: as in the training of the adapter, else 16.
        device: 'auto' is a GPU if there is one.
        dtype: Number type of weights and computation.
        trust_remote_code: Run Python code that comes with `model`.
        trust_code: Run the Python file that the checkpoint names as its template.
        options: Fields of `GenerationOptions`, such as `max_new_tokens` and `temperature`, for all
            answers.

    Raises:
        XTunerError: The model cannot be found or loaded, or an option is wrong.
    """
    from xtuner.chat.opening import open_chat
    from xtuner.generation.generate import GenerationOptions

    session = open_chat(
        model,
        adapter=adapter,
        prompt_template=prompt_template,
        system=system,
        bits=bits,
        options=_options(GenerationOptions(), options),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        trust_code=trust_code,
    )
    return Chat(session)


def _options(options: GenerationOptions, changes: Mapping[str, Any]) -> GenerationOptions:
    """`options` with `changes`, checked."""
    known = [field.name for field in fields(options)]
    for name in changes:
        if name not in known:
            raise ConfigError(
                f"{name}: is not a generation option{did_you_mean(name, known)}; allowed: "
                f"{', '.join(known)}"
            )
    words = changes.get("stop_words", options.stop_words)
    words = (words,) if isinstance(words, str) else tuple(words)
    return replace(options, **{**changes, "stop_words": words})


def _result(work_dir: Path, *, keep_best: bool) -> TrainResult:
    """The result of the last run in `work_dir`, from its files."""
    from xtuner.engine.checkpoint import CheckpointStore
    from xtuner.models.run_info import RunInfo

    store = CheckpointStore(work_dir)
    checkpoint = store.find() if store.all() else None
    info = RunInfo.read(checkpoint) if checkpoint else None
    step, best = info.step if info else 0, store.best() if keep_best else None
    return TrainResult(work_dir, checkpoint, step, _last_metrics(work_dir), best)


def _last_metrics(work_dir: Path) -> dict[str, float]:
    """The scalars of the last step that was logged in `work_dir`."""
    from xtuner.runs.folder import json_lines

    logs = sorted(work_dir.glob("*/scalars.jsonl"), key=lambda file: file.stat().st_mtime_ns)
    for log in reversed(logs):
        if lines := list(json_lines(log)):
            last = [line for line in lines if line["step"] == lines[-1]["step"]]
            merged = {name: value for line in last for name, value in line.items()}
            return {n: float(v) for n, v in merged.items() if n not in ("step", "epoch")}
    return {}


@contextlib.contextmanager
def _only_training() -> Iterator[None]:
    """Reject a second training at the same time, or after a training with several processes."""
    if not _training.acquire(blocking=False):
        raise LaunchError(
            "another training is running in this process, and both would share one random state; "
            "wait for it, or train in another process"
        )
    try:
        if _groups_left:
            raise LaunchError(
                "this process has left the process group of an earlier training; with several "
                "processes, start torchrun once per training"
            )
        try:
            yield
        except TrainInterrupted:
            _leave_group()
            raise
        _leave_group()
    finally:
        _training.release()


def _leave_group() -> None:
    """Record that a finished run has left its process group; a failed one has not."""
    if rank := os.environ.get("RANK"):
        _groups_left.append(rank)


@contextlib.contextmanager
def _process_restored() -> Iterator[None]:
    """Restore the number of threads and free the memory of the run."""
    import torch

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        gc.collect()  # the parts of a run refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
