"""Resolve an entry of `data_path` to a file, a folder of files, or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xtuner.data.sources.readers import SUFFIXES, LocalFile, data_suffix
from xtuner.data.sources.rows import RawRow, Unit
from xtuner.data.sources.saved import saved_files
from xtuner.errors import DataError, did_you_mean

_RUN_FILES = ("run.lock", "last_checkpoint", "run.yaml")
"""Files of a work dir or a checkpoint."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class RowFile(Protocol):
    """A re-iterable file of rows."""

    @property
    def name(self) -> str:
        """The name used in messages."""
        ...

    @property
    def size(self) -> int:
        """The size in the unit of `RawRow.end`."""
        ...

    @property
    def unit(self) -> Unit:
        """Whether rows are numbered by line or by row."""
        ...

    @property
    def note(self) -> str:
        """A note for the user on how the file is read; usually empty."""
        ...

    def digest(self) -> str:
        """A hash of the contents."""
        ...

    def rows(self) -> Iterator[RawRow]:
        """Iterate over the rows; raises DataError if the rest cannot be read."""
        ...


@dataclass(frozen=True)
class Source:
    """The files of one entry of `data_path`."""

    name: str
    files: tuple[RowFile, ...]


def find(entry: str, *, folder: Path, split: str = "train", local: bool = False) -> Source:
    """Find `entry`; a relative path is looked up in `folder`, then in the working directory.

    With `local` a name on the hub is not looked up, and has no files.

    Raises:
        DataError: It exists neither locally nor on the hub, or is a folder without data files.
    """
    candidates = list(
        dict.fromkeys((folder / Path(entry).expanduser(), Path.cwd() / Path(entry).expanduser()))
    )
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        _refuse_missing_path(entry, candidates)
        if local:
            return Source(entry, ())
        from xtuner.data.sources import hub

        return Source(entry, (hub.open_split(entry, split=split),))
    if path.is_dir():
        saved = saved_files(path, entry, split=split)
        if saved is not None:
            named = ((file, str(Path(entry, file.relative_to(path)))) for file in saved)
            return Source(entry, tuple(LocalFile(file, name) for file, name in named))
        return Source(entry, tuple(_files_in(path, entry)))
    if data_suffix(path) not in SUFFIXES:
        raise DataError(
            f"data_path {entry!r}: a data file must end in one of {', '.join(SUFFIXES)}; "
            "text files may have .gz appended"
        )
    return Source(entry, (LocalFile(path, entry),))


def below(name: str, root: str | None, folder: Path) -> str:
    """Return `name` inside `root` (the setting `data_root`) if that exists, otherwise `name`."""
    if root is None or Path(name).expanduser().is_absolute():
        return name
    candidates = (folder / Path(root).expanduser() / name, Path(root).expanduser() / name)
    return next((str(path) for path in candidates if path.exists()), name)


def _files_in(folder: Path, entry: str) -> Iterator[LocalFile]:
    found = False
    for parent, folders, files in os.walk(folder):
        skipped = {n for n in folders if n.startswith(".") or _is_run_folder(Path(parent, n))}
        folders[:] = sorted({*folders} - skipped)
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and data_suffix(path) in SUFFIXES:
                found = True
                yield LocalFile(path, str(Path(entry, path.relative_to(folder))))
    if not found:
        raise DataError(
            f"data_path {entry!r}: the folder contains no data files ({', '.join(SUFFIXES)})"
        )


def _is_run_folder(folder: Path) -> bool:
    """Whether a run wrote `folder`, a work dir or a checkpoint: its reports are not data."""
    return any((folder / name).is_file() for name in _RUN_FILES)


def _refuse_missing_path(entry: str, candidates: list[Path]) -> None:
    """Raise unless `entry` can be a name on the hub; local paths are not looked up there."""
    looks_local = (
        entry.startswith((".", "~", "/"))
        or data_suffix(Path(entry)) in SUFFIXES
        or ("/" in entry and any(path.parent.is_dir() for path in candidates))
    )
    if not looks_local and _HUB_NAME.fullmatch(entry):
        return
    parents = [path.parent for path in candidates if path.parent.is_dir()]
    siblings = [path.name for parent in parents for path in parent.iterdir()]
    raise DataError(
        f"data_path {entry!r}: no such file or folder "
        f"(looked for {', '.join(map(str, candidates))})"
        f"{_in_a_list(entry) or did_you_mean(Path(entry).name, siblings)}"
    )


def _in_a_list(entry: str) -> str:
    """How to write several files, if `entry` is such a text."""
    if re.search(r"[，、【】]|, ?\S+\.\w+", entry):
        return "; several files are written as ['a.csv', 'b.csv'], with the comma of the keyboard"
    return ""
