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
from xtuner.engine.earlier_run import refuse_earlier_run
from xtuner.local_imports import local_imports

_USER_CODE = "user_code"
"""Folder in the work dir for copies of the Python files that the settings name."""


@dataclass(frozen=True)
class RunDirs:
    """The folders of a run: its work dir, and the time-stamped log folder of this start in it."""

    work_dir: Path
    log_dir: Path

    @classmethod
    def prepare(cls, work_dir: Path, *, resuming: bool, overwrite: bool) -> RunDirs:
        """Create the folders.

        Raises:
            CheckpointError: There are checkpoints of an earlier run and neither flag is set.
        """
        CheckpointStore(work_dir).tidy()
        if not resuming and not overwrite:
            refuse_earlier_run(work_dir)
        log_dir = work_dir / time.strftime("%Y%m%d_%H%M%S")
        for number in range(1, 1000):
            with contextlib.suppress(FileExistsError):
                log_dir.mkdir(parents=True)
                break
            log_dir = log_dir.with_name(f"{log_dir.name.split('-')[0]}-{number}")
        return cls(work_dir, log_dir)

    def _keep_user_files(self, settings: Settings, folder: Path) -> dict[str, Any]:
        """Copy the Python files that settings name as ``"my_file.py:object"``, with the modules
        that they import from their own folder, and return these settings with the paths of the
        copies."""

        def kept(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(kept(item) for item in value)
            if not isinstance(value, str) or not plugins.is_user_path(value):
                return value
            if (file := plugins.user_file(value, folder)) is None:
                return value
            copy = _copied(file, self.work_dir / _USER_CODE)
            return f"{copy.relative_to(self.work_dir).as_posix()}:{value.rpartition(':')[2]}"

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


def _copied(file: Path, folder: Path) -> Path:
    """Copy `file` to `folder` and return the copy; with local imports, to a folder of its own
    there. An existing file with other content is kept, and the copy gets another name."""
    local = local_imports(file)
    root = file.parent.resolve()
    contents = {path.relative_to(root): path.read_bytes() for path in local.values()}
    contents[Path(file.name)] = file.read_bytes()
    for number in range(1, 1000):
        stem = file.stem if number == 1 else f"{file.stem}_{number}"
        target = folder / stem if local else folder
        names = {name: name if local else Path(f"{stem}{file.suffix}") for name in contents}
        if all(_written(target / names[name], content) for name, content in contents.items()):
            break
    return target / names[Path(file.name)]


def _written(file: Path, content: bytes) -> bool:
    """Write `file` if it does not exist; return whether it has `content`."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return file.read_bytes() == content


def _absolute(value: Any, folder: Path) -> Any:
    """The absolute path of each name in `value` that exists in `folder` or in the working
    directory; other names and None are unchanged."""
    if isinstance(value, tuple):
        return tuple(_absolute(name, folder) for name in value)
    if value is None:
        return None
    candidates = (base / Path(value).expanduser() for base in (folder, Path.cwd()))
    return next((str(path.resolve()) for path in candidates if path.exists()), value)
