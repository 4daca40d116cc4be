"""Where a run writes: its work dir, earlier runs in it, and the resolved settings."""

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
"""Folder in the work dir for copies of the Python files that the settings name."""


@dataclass(frozen=True)
class WorkPlace:
    """Where a run writes: its work dir, and the time-stamped log folder of this start in it."""

    work_dir: Path
    log_dir: Path

    @classmethod
    def prepare(cls, work_dir: Path, *, resuming: bool, overwrite: bool) -> WorkPlace:
        """Create the folders.

        Raises:
            CheckpointError: There are checkpoints of an earlier run and neither flag is set.
        """
        store = CheckpointStore(work_dir)
        store.tidy()
        checkpoints = store.all()
        if checkpoints and not resuming and not overwrite:
            raise CheckpointError(
                f"{work_dir} holds {checkpoints[-1].name} of an earlier run. Add --resume to "
                "continue it, --work-dir DIR to use another folder, or --overwrite to delete it "
                "and start again."
            )
        log_dir = work_dir / time.strftime("%Y%m%d_%H%M%S")
        for number in range(1, 1000):
            with contextlib.suppress(FileExistsError):
                log_dir.mkdir(parents=True)
                break
            log_dir = log_dir.with_name(f"{log_dir.name.split('-')[0]}-{number}")
        return cls(work_dir, log_dir)

    def _keep_user_files(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """Copy the Python files that settings name as ``"my_file.py:object"``, and return these
        settings with the paths of the copies."""

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
        """Write all settings, as resolved, to ``<name>.py`` in the work dir. Paths are absolute,
        and the user's Python files are copied to the folder ``user_code`` next to it, so that the
        file works from any folder. The user's own file is never overwritten, even if it is in the
        work dir.
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
    """Copy `file` to `folder` and return the copy's name; an existing file of that name is kept."""
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
    directory; other names and None are unchanged."""
    if isinstance(value, tuple):
        return tuple(_absolute(name, folder) for name in value)
    if value is None:
        return None
    candidates = (base / Path(value).expanduser() for base in (folder, Path.cwd()))
    return next((str(path.resolve()) for path in candidates if path.exists()), value)
