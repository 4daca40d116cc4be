"""Find what an entry of `data_path` names: a file, a folder of files, or a data set on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xtuner.data.sources.readers import SUFFIXES, LocalFile, data_suffix
from xtuner.data.sources.rows import RawRow, Unit
from xtuner.errors import DataError, did_you_mean

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class RowFile(Protocol):
    """Rows that can be gone through more than once."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def size(self) -> int:
        """Its extent, in the unit of `RawRow.end`."""
        ...

    @property
    def unit(self) -> Unit:
        """Whether rows are numbered by line or by row."""
        ...

    def digest(self) -> str:
        """Hash of what it holds."""
        ...

    def rows(self) -> Iterator[RawRow]:
        """Go through the rows; raises DataError where the rest cannot be read."""
        ...


@dataclass(frozen=True)
class Source:
    """What one entry of `data_path` names."""

    name: str
    files: tuple[RowFile, ...]


def find(entry: str, *, folder: Path, split: str = "train") -> Source:
    """Find `entry`; a relative path is looked up in `folder`, then in the working directory.

    Raises:
        DataError: it is neither there nor on the hub, or a folder without data files.
    """
    places = list(
        dict.fromkeys((folder / Path(entry).expanduser(), Path.cwd() / Path(entry).expanduser()))
    )
    path = next((place for place in places if place.exists()), None)
    if path is None:
        _refuse_missing_path(entry, places)
        from xtuner.data.sources import hub

        return Source(entry, (hub.open_split(entry, split=split),))
    if path.is_dir():
        return Source(entry, tuple(_files_in(path, entry)))
    if data_suffix(path) not in SUFFIXES:
        raise DataError(
            f"data_path {entry!r}: a data file must end in one of {', '.join(SUFFIXES)}, "
            "the text ones also with .gz after it"
        )
    return Source(entry, (LocalFile(path, entry),))


def below(name: str, root: str | None, folder: Path) -> str:
    """`name` below `root` (the setting `data_root`) if it is there, else `name` as it is."""
    if root is None or Path(name).expanduser().is_absolute():
        return name
    places = (folder / Path(root).expanduser() / name, Path(root).expanduser() / name)
    return next((str(place) for place in places if place.exists()), name)


def _files_in(folder: Path, entry: str) -> Iterator[LocalFile]:
    found = False
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and data_suffix(path) in SUFFIXES:
                found = True
                yield LocalFile(path, str(Path(entry, path.relative_to(folder))))
    if not found:
        raise DataError(
            f"data_path {entry!r}: the folder holds no data file ({', '.join(SUFFIXES)})"
        )


def _refuse_missing_path(entry: str, places: list[Path]) -> None:
    """Raise unless `entry` can be a name on the hub: a missing path is not looked for there."""
    looks_local = (
        entry.startswith((".", "~", "/"))
        or data_suffix(Path(entry)) in SUFFIXES
        or ("/" in entry and any(place.parent.is_dir() for place in places))
    )
    if not looks_local and _HUB_NAME.fullmatch(entry):
        return
    siblings = [p.name for place in places if place.parent.is_dir() for p in place.parent.iterdir()]
    raise DataError(
        f"data_path {entry!r}: there is no such file or folder "
        f"(looked for {', '.join(str(place) for place in places)})"
        f"{did_you_mean(Path(entry).name, siblings)}"
    )
