"""Runs as processes of their own: the page starts, stops and resumes them, and may be closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from xtuner.engine import run_lock
from xtuner.errors import ConfigError, LaunchError
from xtuner.runs.folder import RUNNING, RunFolder
from xtuner.web.folders import Folders

CONSOLE_FILE = "console.log"
SETTINGS_FILE = "settings.py"
MERGED = "merged"
_TAIL_BYTES = 20_000


class Jobs:
    """The processes that this server started.

    Args:
        folders: work dirs lie in `folders.runs`.
        most: how many may run at a time.
    """

    def __init__(self, folders: Folders, *, most: int = 1) -> None:
        self._folders, self._most = folders, most
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()

    def start(self, name: str, settings: str) -> None:
        """Start the run `name` with the text of a settings file.

        Raises:
            ConfigError: the name is taken or no name of a folder.
            LaunchError: enough runs are running.
        """
        work_dir = self._folders.work_dir(name)
        with self._lock:
            if work_dir.exists():
                raise ConfigError(f"{name}: there is a run of this name; choose another")
            self._refuse_more()
            work_dir.mkdir(parents=True)
            (work_dir / SETTINGS_FILE).write_text(settings, encoding="utf-8")
            self._launch(name, self._train(work_dir))

    def resume(self, name: str) -> None:
        """Continue the run `name` from its newest checkpoint.

        Raises:
            ConfigError: it has no settings file or is running.
            LaunchError: enough runs are running.
        """
        work_dir = self._folders.work_dir(name)
        with self._lock:
            if self.is_running(name):
                raise ConfigError(f"{name}: is running")
            self._refuse_more()
            more = ["--resume"] if any(work_dir.glob("iter_*")) else []
            self._launch(name, [*self._train(work_dir), *more])

    def stop(self, name: str) -> bool:
        """Ask the run `name` to save and end; False if it does not run on this machine."""
        work_dir = self._folders.work_dir(name)
        process = self._processes.get(name)
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
            ConfigError: there is no such checkpoint, or the folder exists.
            LaunchError: enough runs are running.
        """
        work_dir = self._folders.work_dir(name)
        run = RunFolder(work_dir)
        if checkpoint not in [path.name for path in run.checkpoints()]:
            raise ConfigError(f"{checkpoint!r}: is no checkpoint of {name}")
        record = run.record
        if record is None:
            raise ConfigError(f"{name}: has no record that names its base model")
        out = work_dir / f"{MERGED}_{checkpoint}"
        if out.exists():
            raise ConfigError(f"{out}: exists already")
        base = str(record.settings["pretrained_model_name_or_path"])
        with self._lock:
            self._refuse_more()
            words = ["convert", "merge", base, str(work_dir / checkpoint), str(out)]
            self._launch(name, words)
        return out

    def is_running(self, name: str) -> bool:
        """Whether a process works on the run `name`."""
        process = self._processes.get(name)
        if process is not None and process.poll() is None:
            return True
        return run_lock.is_held(self._folders.work_dir(name))

    def running(self) -> list[str]:
        """The names of the runs that are running, also of those that others started."""
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
        path = self._folders.work_dir(name) / CONSOLE_FILE
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace")

    def status(self, name: str) -> str:
        """The status of the run; see `RunFolder.status`."""
        if self.is_running(name):
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
                f"{', '.join(running)}: is running, and the page starts {self._most} at a time; "
                "stop it, or wait for its end"
            )

    def _train(self, work_dir: Path) -> list[str]:
        settings = work_dir / SETTINGS_FILE
        if not settings.is_file():
            record = RunFolder(work_dir).record
            settings = work_dir / f"{record.name if record else 'settings'}.py"
        if not settings.is_file():
            raise ConfigError(f"{work_dir.name}: has no settings file to continue with")
        return ["train", str(settings), "--work-dir", str(work_dir)]

    def _launch(self, name: str, words: list[str]) -> None:
        """Start `xtuner` with `words`, in a session of its own, so that it outlives the page."""
        work_dir = self._folders.work_dir(name)
        with (work_dir / CONSOLE_FILE).open("ab") as console:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "xtuner.cli.app", *words],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1"},
            )


def _is_name(folders: Folders, name: str) -> bool:
    try:
        return folders.work_dir(name).is_dir()
    except ConfigError:
        return False
