"""Checkpoints that are there whole or not at all.

    work_dir/iter_N/      weights in Hugging Face format, tokenizer, run.yaml: usable at once
             training_state.pt   only for resuming (`training_state`)
    work_dir/last_checkpoint     the name of the newest
    work_dir/iter_N.pth          its name in a small file, for scripts written for XTuner 0.x

Everything is written into a hidden folder, by all processes, then flushed to the disk and renamed
by the main one; the oldest checkpoint is deleted only after the new one stands. A process killed at
any moment leaves whole checkpoints and at most one hidden folder, which the next save removes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from xtuner.device.out_of_memory import is_out_of_memory
from xtuner.engine.training_state import STATE_FILE
from xtuner.errors import CheckpointError, LaunchError
from xtuner.models import manifest
from xtuner.models.folder_swap import put_in_place, recover
from xtuner.models.save import flush, flush_tree
from xtuner.parallel.activity import busy
from xtuner.parallel.processes import Processes

LAST_FILE = "last_checkpoint"
BEST_FILE = "best_checkpoint"
_LITTLE_SPACE = 256 << 20
"""With fewer bytes free, an error in writing of which nothing is known is due to the disk."""
_NAME = re.compile(r"iter_(\d+)$")


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one work dir.

    Attributes:
        work_dir: where the ``iter_N`` folders are.
        limit: how many are kept; -1 keeps all.
        alias: also write ``iter_N.pth``, so that ``ls -t *.pth | head -n 1`` finds the newest.
    """

    work_dir: Path
    limit: int = -1
    alias: bool = False

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest step first."""
        found = (p for p in self.work_dir.glob("iter_*") if _NAME.fullmatch(p.name) and p.is_dir())
        return sorted(found, key=step_of)

    def save(
        self, step: int, write: Callable[[Path], None], *, processes: Processes | None = None
    ) -> Path:
        """Write checkpoint ``iter_<step>``.

        The main process makes the draft, every process writes its part, and when all have, the main
        process flushes the draft to the disk and renames it. All return or raise together.

        Args:
            step: names the checkpoint.
            write: fills the draft, an empty folder; called on every process.
            processes: those that save together; None if this one is alone.

        Raises:
            LaunchError: the disk is full, or memory is, of any process; earlier checkpoints are
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
        put_in_place(draft, target)
        self._point_at(target.name)
        if self.alias:
            _alias_of(target).write_text(target.name + "\n", encoding="utf-8")
        flush(self.work_dir)
        self._prune(keep=target)

    def tidy(self) -> None:
        """Bring back or remove what a killed save or deletion left behind."""
        recover(self.work_dir)
        for leftover in self.work_dir.glob(".iter_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _point_at(self, text: str, file: str = LAST_FILE) -> None:
        draft = self.work_dir / f".{file}.writing"
        draft.write_text(text + "\n", encoding="utf-8")
        flush(draft)
        os.replace(draft, self.work_dir / file)

    def best(self) -> Path | None:
        """The checkpoint that `mark_best` named, if it is there."""
        pointer = self.work_dir / BEST_FILE
        words = pointer.read_text(encoding="utf-8").split() if pointer.is_file() else []
        path = self.work_dir / words[0] if words else None
        return path if path is not None and _NAME.fullmatch(path.name) and path.is_dir() else None

    def mark_best(self, count: int, told: str) -> None:
        """Keep checkpoint ``iter_<count>`` whatever `limit` says, and name it in the file
        `best_checkpoint`, with `told` behind it."""
        self._point_at(f"iter_{count} {told}", BEST_FILE)
        flush(self.work_dir)

    def _prune(self, keep: Path) -> None:
        if self.limit < 0:
            return
        best = self.best()
        old = [p for p in self.all() if p not in (keep, best)]
        for path in old[: max(0, len(old) + 1 - self.limit)]:
            _remove(path)

    def clear(self, *, keep: Path) -> None:
        """Delete all checkpoints.

        Args:
            keep: a model that must not be among them.

        Raises:
            CheckpointError: it is.
        """
        base = keep.resolve()
        if any(base.is_relative_to(path.resolve()) for path in self.all()):
            raise CheckpointError(
                f"--overwrite would delete {base}, the model that this run starts from: "
                "train elsewhere with --work-dir DIR"
            )
        for pointer in (LAST_FILE, BEST_FILE):
            (self.work_dir / pointer).unlink(missing_ok=True)
        for path in self.all():
            _remove(path)

    def find(self, which: str | None = None) -> Path:
        """The checkpoint named `which` ('iter_N', a path, or None for the newest).

        Raises:
            CheckpointError: there is none, or it cannot be resumed from.
        """
        recover(self.work_dir)
        there = self.all()
        if which is None:
            if not there:
                raise CheckpointError(
                    f"{self.work_dir}: holds no checkpoint to resume from; start without --resume"
                )
            pointer = self.work_dir / LAST_FILE
            newest = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
            return next((path for path in there if path.name == newest), there[-1])
        given = Path(which).expanduser()
        given = given if given.is_dir() else folder_of(given)
        inside = self.work_dir / given
        path = inside if given.name == str(given) and inside.is_dir() else given
        if not (path / STATE_FILE).is_file():
            names = ", ".join(p.name for p in there) or "none"
            raise CheckpointError(
                f"cannot resume from {path}: it "
                f"{f'lacks {STATE_FILE}' if path.is_dir() else 'does not exist'}. "
                f"In {self.work_dir}: {names}"
            )
        return path


def folder_of(name: Path) -> Path:
    """The folder of a checkpoint that is named as XTuner 0.x does, ``iter_N.pth``."""
    return name.with_suffix("") if name.suffix == ".pth" else name


def _alias_of(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.pth")


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint, hidden first: a kill in between leaves no half one."""
    _alias_of(checkpoint).unlink(missing_ok=True)
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def step_of(path: Path) -> int:
    """The step of ``iter_N``."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def _together(act: Callable[[], object], target: Path, processes: Processes | None) -> None:
    """Call `act`; where it fails on any process, raise on all of them and say which failed."""
    error: Exception | None = None
    try:
        with busy(f"writing {target}"):
            act()
    except Exception as raised:
        error = raised
    # torch reports a full disk as RuntimeError, safetensors as an error of its own
    expected = isinstance(error, OSError | RuntimeError | SafetensorError | MemoryError)
    told = [] if error is None else [_fault(error, target)]
    if processes is not None and processes.world_size > 1:
        told = processes.gather([f"process {processes.rank}: {words}" for words in told])
    if error is not None and not expected:
        raise error
    if told:
        raise LaunchError("\n".join(told)) from error


def _fault(error: Exception, target: Path) -> str:
    """What went wrong with writing `target`, and what to do."""
    if is_out_of_memory(error):
        return (
            f"cannot write checkpoint {target}: there is not enough memory for it. Earlier "
            "checkpoints are untouched; end other programs or lower the settings that take "
            "memory (`xtuner train --dry-run` names them), and continue with --resume."
        )
    words = " ".join(str(error).split()) or type(error).__name__
    free = shutil.disk_usage(target.parent).free
    if _is_full_disk(error, free):
        words, cure = f"{words} ({free / 2**20:,.0f} MiB free)", "make room"
    elif isinstance(error, OSError):
        cure = "mend this"
    else:
        words, cure = f"{type(error).__name__}: {words}", "this is not the disk's fault: mend it"
    return (
        f"cannot write checkpoint {target}: {words}. Earlier checkpoints are untouched; {cure} and "
        "continue with --resume."
    )


def _is_full_disk(error: Exception, free: int) -> bool:
    """Whether `error` is due to a lack of space; torch and safetensors report it in their own
    types."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    told = str(error).lower()
    return free < _LITTLE_SPACE or "no space left" in told or "quota" in told
