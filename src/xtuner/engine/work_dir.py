"""Where a run writes: its work dir, what stays of earlier runs there, and the settings as used."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.config.load import LoadedSettings
from xtuner.config.render import render_all
from xtuner.engine.checkpoint import CheckpointStore
from xtuner.errors import CheckpointError


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

    def keep_settings(self, loaded: LoadedSettings) -> None:
        """Write all settings, as resolved, to ``<name>.py`` in the work dir.

        Paths are written whole, so that the file holds wherever it is read from. The user's own
        file is never written to, also when it lies in the work dir.
        """
        given = loaded.settings
        paths = {name: getattr(given, name) for name in type(given).paths()}
        settings = given.model_copy(
            update={name: _absolute(value, loaded.folder) for name, value in paths.items()}
        )
        file = self.work_dir / f"{loaded.name}.py"
        if loaded.path is not None and file.resolve() == loaded.path.resolve():
            file = file.with_stem(f"{file.stem}_resolved")
        text = render_all(settings, title=f"All settings of {loaded.name}, as resolved")
        file.write_text(text, encoding="utf-8")


def _absolute(value: Any, folder: Path) -> Any:
    """The absolute path of each name in `value` that exists in `folder` or in the working
    directory; other names, and None, as they are."""
    if isinstance(value, tuple):
        return tuple(_absolute(name, folder) for name in value)
    if value is None:
        return None
    candidates = (base / Path(value).expanduser() for base in (folder, Path.cwd()))
    return next((str(path.resolve()) for path in candidates if path.exists()), value)
