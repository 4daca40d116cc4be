"""Open the sources of a run, and select the format of each file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtuner import plugins
from xtuner.config.schema import Settings
from xtuner.data import formats
from xtuner.data.formats.base import Format
from xtuner.data.sources import unread
from xtuner.data.sources.find import RowFile, Source, below, find
from xtuner.data.sources.rows import Fault, Task
from xtuner.errors import DataError, listed
from xtuner.types import Row

_INSPECTED_ROWS = 100


@dataclass(frozen=True)
class PreparedSource:
    """A source with its non-empty files and their formats.

    Attributes:
        name: The entry of `data_path`.
        requested_format: Its value of `dataset_format`.
        files, formats: Aligned.
        notes: Notes for the user on how rows are read.
    """

    name: str
    requested_format: str
    files: tuple[RowFile, ...]
    formats: tuple[Format, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Total size of the files."""
        return sum(file.size for file in self.files)

    def tasks(self) -> Iterator[Task]:
        """Iterate over the rows of all files; `end` counts from the start of the first file."""
        offset = 0
        for number, file in enumerate(self.files):
            for row in file.rows():
                yield Task(number, row._replace(end=offset + row.end))
            offset += file.size

    def location(self, file: int, line: int) -> str:
        """The location of a row for messages."""
        return f"{self.files[file].name} {self.files[file].unit} {line}"


def prepare(
    settings: Settings, *, folder: Path, local: bool = False, unusable: list[str] | None = None
) -> list[PreparedSource]:
    """Open all sources; relative paths are looked up in `folder`, then in the working directory.

    With `local` only files and folders are opened, for a first check that imports nothing heavy:
    no names on the hub, and no format in a file of the user's. A list `unusable` gets the problem
    of each source and file that cannot be used, and the others are opened.

    Raises:
        DataError: A source is missing or empty, or its format is unknown; all problems are listed.
        ConfigError: Unknown format.
    """
    requested = settings.dataset_format
    entries = zip(settings.data_path, requested * len(settings.data_path), strict=False)
    prepared, problems = [], []
    for entry, format_name in entries:
        try:
            entry = below(entry, settings.data_root, folder)
            source = find(entry, folder=folder, split=settings.dataset_split, local=local)
            if local and (not source.files or plugins.is_user_path(format_name)):
                continue
            names = dict(settings.columns)
            prepared.append(_prepared(source, format_name, folder, names, unusable))
        except DataError as error:
            problems.append(str(error))
    if unusable is not None:
        unusable += problems
        return prepared
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        raise DataError(listed(f"{len(problems)} problems with the data:", problems))
    if not local or len(prepared) == len(settings.data_path):
        _refuse_unknown_columns(settings, prepared)
    return prepared


def of_validation(settings: Settings) -> Settings | None:
    """`settings` with the rows of `validation_path` as data; None without such rows."""
    if not settings.validation_path:
        return None
    formats = settings.dataset_format
    changes = {
        "data_path": settings.validation_path,
        "dataset_format": formats if len(formats) == 1 else ("auto",),
        **dict.fromkeys(("data_repeats", "data_weights", "max_dataset_length")),
        "shuffle": False,
    }
    return settings.model_copy(update=changes)


def _refuse_unknown_columns(settings: Settings, prepared: Sequence[PreparedSource]) -> None:
    """Raise if no file has a column that the setting `columns` names."""
    kinds = [format for source in prepared for format in source.formats]
    if any(plugins.is_user_path(format.name) for format in kinds):
        return
    read = {column for format in kinds for column in format.renames}
    if missing := [repr(column) for column, _ in settings.columns if column not in read]:
        raise DataError(f"columns: no file of data_path has a column {' or '.join(missing)}")


def _prepared(
    source: Source,
    format_name: str,
    folder: Path,
    names: Mapping[str, str],
    unusable: list[str] | None,
) -> PreparedSource:
    files, found, notes = [], [], dict[str, None]()
    for file in source.files:
        try:
            head = [raw.parsed() for raw in itertools.islice(file.rows(), _INSPECTED_ROWS)]
            if not head:
                continue
            columns = _columns(head)
            format = _format(file, format_name, columns, head, folder, names)
        except DataError as error:
            if unusable is None or len(source.files) == 1:
                raise
            unusable.append(str(error))
            continue
        files.append(file)
        found.append(format)
        if note := " and ".join(f"{c!r} as {n!r}" for c, n in found[-1].renames.items()):
            notes[f"{source.name}: reads column {note}"] = None
        if file.note:
            notes[f"{source.name}: {file.note}"] = None
        for column, alias in found[-1].aliases.items():
            if alias in columns:
                notes[f"{source.name}: the key {alias!r} is read as {column!r}"] = None
        rest = found[-1].unread(columns)
        for note in unread.notes(found[-1], _rows(head), rest):
            notes[f"{source.name}: {note}"] = None
        if format_name != formats.AUTO and (kind := unread.other_kind(_rows(head), rest)):
            notes[f"{source.name}: {kind}"] = None
    if not files:
        raise DataError(f"{source.name}: contains no rows that can be read")
    return PreparedSource(source.name, format_name, tuple(files), tuple(found), tuple(notes))


def _columns(head: Sequence[Row | Fault]) -> tuple[str, ...]:
    """The union of the columns of the rows in `head`."""
    return tuple(dict.fromkeys(column for row in head if isinstance(row, dict) for column in row))


def _format(
    file: RowFile,
    name: str,
    columns: tuple[str, ...],
    head: Sequence[Row | Fault],
    folder: Path,
    names: Mapping[str, str],
) -> Format:
    """Resolve the format by the `columns` of the rows in `head`."""
    rows = _rows(head)
    if not rows:
        fault = next(row for row in head if isinstance(row, Fault))
        count = f"first {len(head)} rows" if len(head) > 1 else "rows"
        raise DataError(f"{file.name}: none of the {count} can be read: the first {fault}")
    try:
        sample = formats.recognised_row(rows, columns)
        format = formats.resolve(name, columns=columns, folder=folder, sample=sample, names=names)
    except DataError as error:
        kind = unread.other_kind(rows, columns) or unread.encoded_already(columns)
        raise DataError(f"{file.name}: {kind or error}") from error
    if name == formats.AUTO and (kind := unread.other_kind(rows, format.unread(columns))):
        raise DataError(
            f"{file.name}: {kind}. To train on its other columns anyway, set dataset_format = "
            f"{format.name!r}"
        )
    return format


def _rows(head: Sequence[Row | Fault]) -> list[Row]:
    return [row for row in head if isinstance(row, dict)]
