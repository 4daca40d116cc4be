"""Runs as separate processes: the page starts, stops and resumes them, and may be closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from xtuner.engine import run_lock
from xtuner.errors import ConfigError, LaunchError, count
from xtuner.runs.folder import MERGED, RUNNING, RunFolder
from xtuner.web.folders import Folders

CONSOLE_FILE = "console.log"
MERGE_LOG = "merge.log"
SETTINGS_FILE = "settings.py"
_TAIL_BYTES = 20_000


class Jobs:
    """The processes that this server started.

    Args:
        folders: Work dirs are in `folders.runs`.
        most: How many may run at a time.
    """

    def __init__(self, folders: Folders, *, most: int = 1) -> None:
        self._folders, self._most = folders, most
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._merges: dict[str, _Merge] = {}
        self._lock = threading.Lock()

    def start(self, name: str, settings: str) -> None:
        """Start the run `name` with the text of a settings file.

        Raises:
            ConfigError: The name is taken, or not the name of a folder.
            LaunchError: As many runs as allowed are running.
        """
        work_dir = self._folders.work_dir(name)
        with self._lock:
            if work_dir.exists():
                raise ConfigError(f"{name}: a run with this name exists; choose another name")
            self._refuse_more()
            work_dir.mkdir(parents=True)
            (work_dir / SETTINGS_FILE).write_text(settings, encoding="utf-8")
            self._processes[name] = self._launch(work_dir / CONSOLE_FILE, self._train(work_dir))

    def resume(self, name: str) -> None:
        """Continue the run `name` from its newest checkpoint.

        Raises:
            ConfigError: It has no settings file or is running.
            LaunchError: As many runs as allowed are running.
        """
        work_dir = self._folders.work_dir(name)
        with self._lock:
            if self.is_running(name):
                raise ConfigError(f"{name}: is running")
            self._refuse_more()
            more = ["--resume"] if any(work_dir.glob("iter_*")) else []
            words = [*self._train(work_dir), *more]
            self._processes[name] = self._launch(work_dir / CONSOLE_FILE, words)

    def stop(self, name: str) -> bool:
        """Ask the run `name` to save and end, or its merge to end; False if neither runs here."""
        work_dir = self._folders.work_dir(name)
        merge = self._merges.get(name)
        for process in (self._processes.get(name), merge.process if merge else None):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                return True
        pid = run_lock.holder_pid(work_dir)
        if pid is None:
            return False
        os.kill(pid, signal.SIGTERM)
        return True

    def merge(self, name: str, checkpoint: str) -> Path:
        """Merge the adapter of `checkpoint` into its base model, in a process; return the folder.

        Raises:
            ConfigError: There is no such checkpoint, or the folder exists.
            LaunchError: As many runs as allowed are running.
        """
        work_dir = self._folders.work_dir(name)
        run = RunFolder(work_dir)
        if checkpoint not in [path.name for path in run.checkpoints()]:
            raise ConfigError(f"{checkpoint!r}: is not a checkpoint of {name}")
        record = run.record
        if record is None:
            raise ConfigError(f"{name}: has no record of its base model")
        out = work_dir / f"{MERGED}{checkpoint}"
        if out.exists():
            raise ConfigError(f"{out}: already exists")
        with self._lock:
            self._refuse_more()
            words = ["convert", "merge", record.base_model, str(work_dir / checkpoint), str(out)]
            log = work_dir / MERGE_LOG
            log.unlink(missing_ok=True)
            self._merges[name] = _Merge(out, self._launch(log, words))
        return out

    def merging(self, name: str) -> tuple[str, Path] | None:
        """The last merge of the run `name`: 'running', 'finished' or 'failed', and its folder."""
        merge = self._merges.get(name)
        if merge is None:
            return None
        code = merge.process.poll()
        return "running" if code is None else "failed" if code else "finished", merge.out

    def is_running(self, name: str) -> bool:
        """Whether a process trains or merges the run `name`."""
        merge = self.merging(name)
        return self.is_training(name) or (merge is not None and merge[0] == "running")

    def is_training(self, name: str) -> bool:
        """Whether a process trains the run `name`."""
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            return True
        return run_lock.is_held(self._folders.work_dir(name))

    def running(self) -> list[str]:
        """The names of the runs that are running, including those started elsewhere."""
        names = [path.name for path in self._folders.runs.glob("*") if path.is_dir()]
        return [name for name in names if _is_name(self._folders, name) and self.is_running(name)]

    def names(self) -> list[str]:
        """All runs, the newest first."""
        found = []
        for path in self._folders.runs.glob("*") if self._folders.runs.is_dir() else ():
            if not _is_name(self._folders, path.name):
                continue
            started = [p.stat().st_mtime for p in path.glob("*/scalars.jsonl")]
            if (path / CONSOLE_FILE).is_file():
                started.append((path / CONSOLE_FILE).stat().st_mtime)
            if started:
                found.append((max(started), path.name))
        return [name for _, name in sorted(found, reverse=True)]

    def console(self, name: str) -> str:
        """The end of what the run `name` printed."""
        return _end_of(self._folders.work_dir(name) / CONSOLE_FILE)

    def merge_log(self, name: str) -> str:
        """The end of what the last merge of the run `name` printed."""
        return _end_of(self._folders.work_dir(name) / MERGE_LOG)

    def status(self, name: str) -> str:
        """The status of the run; see `RunFolder.status`."""
        if self.is_training(name):
            return RUNNING
        process = self._processes.get(name)
        failed = process is not None and process.returncode not in (None, 0, 130)
        work_dir = self._folders.work_dir(name)
        try:
            found = RunFolder(work_dir).status()
        except Exception:
            return "failed"
        return "failed" if failed else found

    def _refuse_more(self) -> None:
        running = self.running()
        if len(running) >= self._most:
            raise LaunchError(
                f"{', '.join(running)}: is running, and the page starts at most "
                f"{count(self._most, 'run')} at a time (--max-runs); stop it, or wait until it ends"
            )

    def _train(self, work_dir: Path) -> list[str]:
        settings = work_dir / SETTINGS_FILE
        if not settings.is_file():
            record = RunFolder(work_dir).record
            settings = work_dir / f"{record.name if record else 'settings'}.py"
        if not settings.is_file():
            raise ConfigError(f"{work_dir.name}: has no settings file to resume with")
        return ["train", str(settings), "--work-dir", str(work_dir)]

    def _launch(self, log: Path, words: list[str]) -> subprocess.Popen[bytes]:
        """Start `xtuner` with `words` in a session of its own, so that it outlives the page."""
        with log.open("ab") as console:
            return subprocess.Popen(
                [sys.executable, "-m", "xtuner.cli.app", *words],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
            )


@dataclass(frozen=True)
class _Merge:
    out: Path
    process: subprocess.Popen[bytes]


def _end_of(path: Path) -> str:
    """The end of a text file; empty if it does not exist."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode("utf-8", "replace")


def _is_name(folders: Folders, name: str) -> bool:
    try:
        return folders.work_dir(name).is_dir()
    except ConfigError:
        return False
