"""Open the sources that the settings name, and settle the format of each of their files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xtuner.config.schema import Settings
from xtuner.data import formats
from xtuner.data.formats.base import Format
from xtuner.data.sources.find import RowFile, Source, below, find
from xtuner.data.sources.rows import Fault, parse
from xtuner.data.tokenize.workers import Task
from xtuner.errors import DataError, listed

_ROWS_LOOKED_AT = 100


@dataclass(frozen=True)
class PreparedSource:
    """A source whose files have rows, each with its format.

    Attributes:
        name: the entry of `data_path`.
        asked_format: what `dataset_format` says for it.
        files, formats: aligned.
        notes: what the user may want to know of how rows are read.
    """

    name: str
    asked_format: str
    files: tuple[RowFile, ...]
    formats: tuple[Format, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Extent of all files."""
        return sum(file.size for file in self.files)

    def tasks(self) -> Iterator[Task]:
        """Go through the rows of all files; the `end` of a row counts from the first file on."""
        before = 0
        for number, file in enumerate(self.files):
            for row in file.rows():
                yield Task(number, row._replace(end=before + row.end))
            before += file.size

    def place(self, file: int, line: int) -> str:
        """Name a row as messages do."""
        return f"{self.files[file].name} {self.files[file].unit} {line}"


def prepare(settings: Settings, *, folder: Path) -> list[PreparedSource]:
    """Open all sources of `settings`; relative paths are looked up in `folder`, then where we are.

    Raises:
        DataError: a source is missing or empty, or its format cannot be told; all of them at once.
        ConfigError: there is no format of that name.
    """
    asked = settings.dataset_format
    entries = zip(settings.data_path, asked * len(settings.data_path), strict=False)
    prepared, problems = [], []
    for entry, format_name in entries:
        try:
            entry = below(entry, settings.data_root, folder)
            source = find(entry, folder=folder, split=settings.dataset_split)
            prepared.append(_prepared(source, format_name, folder))
        except DataError as error:
            problems.append(str(error))
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(listed(f"{len(problems)} problems with the data:", problems))
    return prepared


def _prepared(source: Source, format_name: str, folder: Path) -> PreparedSource:
    files, found, notes = [], [], dict[str, None]()
    for file in source.files:
        seen = [_row(task.value) for task in itertools.islice(file.rows(), _ROWS_LOOKED_AT)]
        if not seen:
            continue
        files.append(file)
        columns = _columns(seen)
        found.append(_format(file, format_name, columns, seen, folder))
        for column, alias in found[-1].aliases.items():
            if alias in columns:
                notes[f"{source.name}: the key {alias!r} is read as {column!r}, its right name"] = (
                    None
                )
    if not files:
        raise DataError(f"{source.name}: holds no rows")
    return PreparedSource(source.name, format_name, tuple(files), tuple(found), tuple(notes))


def _row(value: object) -> object:
    return parse(value) if isinstance(value, bytes) else value


def _columns(seen: list[object]) -> tuple[str, ...]:
    """The columns of all rows `seen`; some rows may lack some."""
    return tuple(dict.fromkeys(column for row in seen if isinstance(row, dict) for column in row))


def _format(
    file: RowFile, name: str, columns: tuple[str, ...], seen: list[object], folder: Path
) -> Format:
    """Resolve the format by the `columns` of the rows `seen`."""
    rows = [row for row in seen if isinstance(row, dict)]
    if not rows:
        fault = next(row for row in seen if isinstance(row, Fault))
        raise DataError(
            f"{file.name}: none of the first {len(seen)} rows can be read: each {fault}"
        )
    try:
        return formats.resolve(name, columns=columns, folder=folder, sample=rows[0])
    except DataError as error:
        raise DataError(f"{file.name}: {error}") from error
