"""Atomic checkpoints: complete or absent.

    work_dir/iter_N/      weights in Hugging Face format, tokenizer, run.yaml: ready to use
             training_state.pt   only for resuming (`training_state`)
    work_dir/last_checkpoint     the name of the newest
    work_dir/iter_N.pth          its name in a small file, for scripts written for XTuner 0.x

All processes write into a hidden folder; the main process then flushes it to disk and renames it.
The oldest checkpoint is deleted only after the new one is complete. A process killed at any moment
leaves complete checkpoints and at most one hidden folder, which the next save removes.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine.training_state import STATE_FILE
from xtuner.errors import CheckpointError, LaunchError, message_of
from xtuner.models import manifest
from xtuner.models.folder_swap import recover, replace_folder
from xtuner.models.references import checkpoints_in, pointer_words
from xtuner.models.save import flush, flush_tree
from xtuner.parallel.activity import busy
from xtuner.parallel.processes import Processes

LAST_FILE = "last_checkpoint"
BEST_FILE = "best_checkpoint"
UPLOAD = "upload_"
"""Prefix of a folder with the files of a checkpoint whose upload failed."""
_LOW_SPACE = 256 << 20
"""With fewer bytes free, an unknown write error is taken for a full disk."""


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints in one work dir.

    Attributes:
        work_dir: The folder that contains the ``iter_N`` folders.
        limit: Number of checkpoints to keep; -1 keeps all.
        alias: Also write ``iter_N.pth``, so that ``ls -t *.pth | head -n 1`` finds the newest.
    """

    work_dir: Path
    limit: int = -1
    alias: bool = False

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest step first."""
        return checkpoints_in(self.work_dir)

    def save(
        self, step: int, write: Callable[[Path], None], *, processes: Processes | None = None
    ) -> Path:
        """Write checkpoint ``iter_<step>``.

        The main process creates a draft folder, and every process writes its part. When all are
        done, the main process flushes the draft to disk and renames it. All processes return or
        raise together.

        Args:
            step: The number in the checkpoint's name.
            write: Fills the draft, an empty folder; called on every process.
            processes: The processes that save together; None for a single process.

        Raises:
            LaunchError: The disk is full or a process is out of memory; earlier checkpoints are
                untouched.
        """
        target = self.work_dir / f"iter_{step}"
        draft = self.work_dir / f".iter_{step}.writing"
        is_main = processes is None or processes.is_main
        try:
            _together(lambda: self._begin(draft) if is_main else None, target, processes)
            _together(lambda: write(draft), target, processes)
            _together(lambda: self._finish(draft, target) if is_main else None, target, processes)
        except BaseException:
            if is_main:
                shutil.rmtree(draft, ignore_errors=True)
            raise
        return target

    def _begin(self, draft: Path) -> None:
        self.tidy()
        draft.mkdir(parents=True)

    def _finish(self, draft: Path, target: Path) -> None:
        manifest.write(draft)
        flush_tree(draft)
        replace_folder(draft, target)
        self._point_at(target.name)
        if self.alias:
            _alias_of(target).write_text(target.name + "\n", encoding="utf-8")
        flush(self.work_dir)
        self._prune(keep=target)

    def tidy(self) -> None:
        """Restore or remove what an interrupted save or deletion left behind."""
        recover(self.work_dir)
        for leftover in self.work_dir.glob(".iter_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _point_at(self, text: str, file: str = LAST_FILE) -> None:
        draft = self.work_dir / f".{file}.writing"
        draft.write_text(text + "\n", encoding="utf-8")
        flush(draft)
        os.replace(draft, self.work_dir / file)

    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named; None if it does not exist."""
        name = self.best_entry()[0]
        return next((path for path in self.all() if path.name == name), None)

    def best_entry(self) -> tuple[str, str, float]:
        """What the file `best_checkpoint` says: the name of the checkpoint, the metric and its
        value. Empty, and NaN, where it says nothing."""
        name, metric, value = [*pointer_words(self.work_dir / BEST_FILE), "", ""][:3]
        try:
            return name, metric, float(value)
        except ValueError:
            return name, "", math.nan

    def mark_best(self, name: str, summary: str) -> None:
        """Keep checkpoint `name` whatever `limit` is; write its name and `summary` to the file
        `best_checkpoint`."""
        self._point_at(f"{name} {summary}", BEST_FILE)
        flush(self.work_dir)

    def mark_none(self) -> None:
        """Delete the file `best_checkpoint`: no checkpoint is the best."""
        (self.work_dir / BEST_FILE).unlink(missing_ok=True)

    def _prune(self, keep: Path) -> None:
        if self.limit < 0:
            return
        best = self.best()
        old = [p for p in self.all() if p not in (keep, best)]
        for path in old[: max(0, len(old) + 1 - self.limit)]:
            _remove(path)

    def clear(self, *, keep: Path) -> None:
        """Delete all checkpoints, and what was to be uploaded; raise CheckpointError if the model
        `keep` is one of them."""
        base = keep.resolve()
        uploads = [path for path in self.work_dir.glob(f"{UPLOAD}iter_*") if path.is_dir()]
        if any(base.is_relative_to(path.resolve()) for path in (*self.all(), *uploads)):
            raise CheckpointError(
                f"--overwrite would delete {base}, the model that this run starts from: "
                "train elsewhere with --work-dir DIR"
            )
        for pointer in (LAST_FILE, BEST_FILE):
            (self.work_dir / pointer).unlink(missing_ok=True)
        for path in (*self.all(), *uploads):
            _remove(path)

    def find(self, which: str | None = None) -> Path:
        """Return the checkpoint `which`: 'iter_N', a path, or None for the newest.

        Raises:
            CheckpointError: It does not exist or cannot be resumed from.
        """
        recover(self.work_dir)
        found = self.all()
        if which is None:
            if not found:
                raise CheckpointError(
                    f"{self.work_dir}: contains no checkpoint to resume from; start without "
                    f"--resume"
                )
            newest = pointer_words(self.work_dir / LAST_FILE)[0]
            return next((path for path in found if path.name == newest), found[-1])
        given = Path(which).expanduser()
        given = given if given.is_dir() else folder_of(given)
        inside = self.work_dir / given
        path = inside if given.name == str(given) and inside.is_dir() else given
        if not (path / STATE_FILE).is_file():
            beside = path.parent if path.parent.is_dir() and str(path) != path.name else None
            folders = [self.work_dir, *([beside] if beside and beside != self.work_dir else [])]
            lists = [f"In {folder}: {_names_in(folder)}" for folder in folders]
            raise CheckpointError(
                f"cannot resume from {path}: it "
                f"{f'lacks {STATE_FILE}' if path.is_dir() else 'does not exist'}. "
                f"{'. '.join(lists)}"
            )
        return path


def _names_in(folder: Path) -> str:
    return ", ".join(path.name for path in checkpoints_in(folder)) or "none"


def folder_of(name: Path) -> Path:
    """The folder of a checkpoint given by its XTuner 0.x name, ``iter_N.pth``."""
    return name.with_suffix("") if name.suffix == ".pth" else name


def _alias_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.pth")


def _remove(checkpoint: Path) -> None:
    """Hide a checkpoint, then delete it: an interruption leaves no partial checkpoint visible."""
    _alias_of(checkpoint).unlink(missing_ok=True)
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _together(act: Callable[[], object], target: Path, processes: Processes | None) -> None:
    """Call `act`; if it fails on any process, raise on all of them and name the ones that
    failed."""
    error: Exception | None = None
    try:
        with busy(f"writing {target}"):
            act()
    except Exception as raised:
        error = raised
    # torch reports a full disk as RuntimeError, safetensors as its own error type, and
    # transformers an invalid configuration as ValueError
    known = OSError | RuntimeError | ValueError | SafetensorError | MemoryError
    expected = isinstance(error, known)
    messages = [] if error is None else [_fault(error, target)]
    if processes is not None and processes.world_size > 1:
        messages = processes.gather([f"process {processes.rank}: {words}" for words in messages])
    if error is not None and not expected:
        raise error
    if messages:
        raise LaunchError("\n".join(messages)) from error


def _fault(error: Exception, target: Path) -> str:
    """Describe why `target` could not be written and what to do."""
    if is_out_of_memory(error):
        return (
            f"cannot write checkpoint {target}: out of memory. Earlier checkpoints are untouched; "
            f"close other programs or lower the settings that use memory (`xtuner train "
            f"--dry-run` lists them), and continue with --resume."
        )
    words = message_of(error)
    free = shutil.disk_usage(target.parent).free
    if _is_full_disk(error, free):
        words, hint = f"{words} ({free / 2**20:,.0f} MiB free)", "free some disk space"
    elif isinstance(error, OSError):
        hint = "fix this"
    else:
        words, hint = f"{type(error).__name__}: {words}", "fix this (the disk is not full)"
    return (
        f"cannot write checkpoint {target}: {words}. Earlier checkpoints are untouched; {hint} and "
        "continue with --resume."
    )


def _is_full_disk(error: Exception, free: int) -> bool:
    """Whether the disk is full; torch and safetensors report this with their own error types."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = str(error).lower()
    return free < _LOW_SPACE or "no space left" in text or "quota" in text
