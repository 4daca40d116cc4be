"""Where a run writes: its work dir, what stays of earlier runs there, and the settings as used."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner import plugins
from xtuner.config.load import LoadedSettings
from xtuner.config.render import render_all
from xtuner.config.schema import Settings
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.errors import CheckpointError

_USER_CODE = "user_code"
"""Folder in the work dir for the user's Python files that settings name."""


def work_dir_of(loaded: LoadedSettings, given: Path | None = None) -> Path:
    """The work dir of a run: `given`, else what its settings say, else ``work_dirs/NAME``."""
    folder = given or Path(loaded.settings.work_dir or Path("work_dirs") / loaded.name)
    return folder.expanduser()


@dataclass(frozen=True)
class WorkPlace:
    """Where a run writes: its work dir, and in it the time-stamped folder of this start."""

    work_dir: Path
    log_dir: Path

    @classmethod
    def prepare(cls, work_dir: Path, *, resuming: bool, overwrite: bool) -> WorkPlace:
        """Make the folders.

        Raises:
            CheckpointError: checkpoints of an earlier run are there and neither flag says what to
                do.
        """
        store = CheckpointStore(work_dir)
        store.tidy()
        there = store.all()
        if there and not resuming and not overwrite:
            raise CheckpointError(
                f"{work_dir} holds {there[-1].name} of an earlier run. Add --resume to go on, "
                "--work-dir DIR to train elsewhere, or --overwrite to delete it and start again."
            )
        log_dir = work_dir / time.strftime("%Y%m%d_%H%M%S")
        for number in range(1, 1000):
            with contextlib.suppress(FileExistsError):
                log_dir.mkdir(parents=True)
                break
            log_dir = log_dir.with_name(f"{log_dir.name.split('-')[0]}-{number}")
        return cls(work_dir, log_dir)

    def _keep_user_files(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """Copy the Python files that settings name as ``"my_file.py:object"``, and return those
        settings with the names of the copies."""

        def kept(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(kept(item) for item in value)
            if not isinstance(value, str) or not plugins.is_user_path(value):
                return value
            name, _, attribute = value.rpartition(":")
            bases = (folder, Path.cwd())
            files = (base / Path(name).expanduser() for base in bases)
            file = next((file for file in files if file.is_file()), None)
            if file is None:
                return value
            return f"{_USER_CODE}/{_copied(file, self.work_dir / _USER_CODE)}:{attribute}"

        values = {name: getattr(settings, name) for name in type(settings).model_fields}
        changed = {name: kept(value) for name, value in values.items()}
        return {name: value for name, value in changed.items() if value != values[name]}

    def keep_settings(self, loaded: LoadedSettings) -> None:
        """Write all settings, as resolved, to ``<name>.py`` in the work dir.

        Paths are written whole, and Python files of the user are copied to the folder ``user_code``
        beside it, so that the file holds wherever it is read from. The user's own file is never
        written to, also when it lies in the work dir.
        """
        given = loaded.settings
        paths = {name: getattr(given, name) for name in type(given).paths()}
        changes = {name: _absolute(value, loaded.folder) for name, value in paths.items()}
        changes |= self._keep_user_files(given, loaded.folder)
        settings = given.model_copy(update=changes)
        file = self.work_dir / f"{loaded.name}.py"
        if loaded.path is not None and file.resolve() == loaded.path.resolve():
            file = file.with_stem(f"{file.stem}_resolved")
        text = render_all(settings, title=f"All settings of {loaded.name}, as resolved")
        file.write_text(text, encoding="utf-8")


def _copied(file: Path, folder: Path) -> str:
    """Copy `file` to `folder`, and return its name there; another file of that name stays."""
    content = file.read_bytes()
    for number in range(1, 1000):
        name = file.name if number == 1 else f"{file.stem}_{number}{file.suffix}"
        target = folder / name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        if target.read_bytes() == content:
            break
    return name


def _absolute(value: Any, folder: Path) -> Any:
    """The absolute path of each name in `value` that exists in `folder` or in the working
    directory; other names, and None, as they are."""
    if isinstance(value, tuple):
        return tuple(_absolute(name, folder) for name in value)
    if value is None:
        return None
    candidates = (base / Path(value).expanduser() for base in (folder, Path.cwd()))
    return next((str(path.resolve()) for path in candidates if path.exists()), value)
