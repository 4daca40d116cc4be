"""The folders that the page may use: every path from the browser must be in one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xtuner.errors import ConfigError
from xtuner.hub.fetch import models_root

_RUN_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class Folders:
    """Where the page may read and write.

    Attributes:
        runs: Work dirs are created here.
        readable: Folders with models and data.
    """

    runs: Path
    readable: tuple[Path, ...]

    @classmethod
    def of(cls, runs: Path, readable: Iterable[Path]) -> Folders:
        """The folders, and that of fetched models, with links resolved."""
        roots = [runs, models_root(), *readable]
        resolved = dict.fromkeys(Path(root).expanduser().resolve() for root in roots)
        return cls(Path(runs).expanduser().resolve(), tuple(resolved))

    def is_inside(self, path: Path) -> bool:
        """Whether `path`, with links resolved, is in one of the folders."""
        return any(path.resolve().is_relative_to(root) for root in self.readable)

    def check(self, name: str) -> str:
        """Return `name` if it is a name on the hub, or a path inside the folders.

        Raises:
            ConfigError: It is outside the folders.
        """
        if "\0" in name:
            raise ConfigError("a name cannot contain a NUL")
        path = Path(name).expanduser()
        looks_like_path = path.is_absolute() or name.startswith((".", "~")) or ".." in path.parts
        if not looks_like_path and not path.exists():
            return name
        if self.is_inside(path):
            return name
        allowed = ", ".join(map(str, self.readable))
        raise ConfigError(
            f"{name}: is outside the folders that the page may use ({allowed}); restart `xtuner "
            "web` with --allow FOLDER to add one"
        )

    def work_dir(self, name: str) -> Path:
        """The work dir of the run `name`.

        Raises:
            ConfigError: The name is not that of a run, or is a link out of the folder.
        """
        path = self.runs / name
        if not _RUN_NAME.fullmatch(name) or path.resolve().parent != self.runs:
            raise ConfigError(
                f"{name!r}: the name of a run has letters, digits, '.', '_' and '-', and begins "
                "with a letter or digit"
            )
        return path
