"""Dataset formats, one file each; the file name is the value of the setting `dataset_format`.

A file defines ``FORMAT``, a `Format`; adding a file adds a format. Files whose names begin with an
underscore contain code that several formats share.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from xtuner import plugins
from xtuner.data.formats import _columns
from xtuner.data.formats.base import Format, RowError
from xtuner.errors import DataError
from xtuner.types import Row

__all__ = ["AUTO", "Format", "RowError", "load", "load_all", "names", "recognised_row", "resolve"]

AUTO = "auto"
"""The value of `dataset_format` that selects a format by the columns."""

_SETTING = "dataset_format"
_ADVICE = (
    "`xtuner list-dataset-format` shows what each format expects; a function of your own is "
    f"{_SETTING} = 'my_format.py:to_messages'."
)


def names() -> list[str]:
    """Names of the formats, sorted, without 'auto'."""
    return plugins.names(__name__)


def load(name: str) -> Format:
    """Load a format by name.

    Raises:
        ConfigError: There is no such format.
    """
    found: Format = plugins.load(__name__, name, setting=_SETTING).FORMAT
    return found


def load_all() -> list[Format]:
    """Every format, sorted by name."""
    return [load(name) for name in names()]


def resolve(
    name: str,
    *,
    columns: Collection[str],
    folder: Path | None = None,
    sample: Row | None = None,
    names: Mapping[str, str] | None = None,
) -> Format:
    """Resolve the format of a data file.

    Args:
        name: A format, 'auto', or ``"my_format.py:to_messages"``.
        columns: The columns of the file.
        folder: Where a relative path of a user's file is looked up first.
        sample: A row of the file. It lets 'auto' distinguish formats with the same columns, such as
            plain text and the dialogues of `oasst1`.
        names: The setting `columns`: the roles of the file's columns by name.

    Raises:
        ConfigError: There is no such format, or `names` is wrong.
        DataError: The columns do not match the format, or 'auto' finds no matching format.
    """
    if plugins.is_user_path(name):
        from xtuner.data.formats import _own

        return _own.load(name, setting=_SETTING, folder=folder)
    known = {column for format in load_all() for column in (*format.columns, *format.optional)}
    chosen = _columns.chosen(columns, names or {}, known)
    if name == AUTO and {"question", "answer"} <= {*chosen.names.values()}:
        name = "qa"
    fits = _any_fits if name == AUTO else lambda found: not load(name).missing(found)
    usual = _columns.by_usual_names(chosen.columns, fits) if not fits(chosen.columns) else None
    renames = _chained(chosen.names, usual.names if usual else {})
    found = usual.columns if usual else chosen.columns
    if name == AUTO:
        sample = sample and {renames.get(column, column): value for column, value in sample.items()}
        return _columns.with_names(_pick(found, sample), renames)
    format = load(name)
    if format.missing(found):
        raise DataError(_misfit(format, found, sample))
    return _columns.with_names(format, renames)


def _any_fits(columns: Collection[str]) -> bool:
    return any(not format.missing(columns) for format in load_all())


def _chained(first: Mapping[str, str], then: Mapping[str, str]) -> dict[str, str]:
    """The names of columns after both renamings."""
    both = {column: then.get(name, name) for column, name in first.items()}
    return {**{c: n for c, n in then.items() if c not in first.values()}, **both}


def _pick(columns: Collection[str], sample: Row | None) -> Format:
    """Select among the matching formats by the columns used, the priority and the row."""
    best = _best(columns)
    if not best:
        raise DataError(
            f"no format matches the columns {_quoted(columns)}.\n  {_nearest(columns)}\n  "
            f"{_columns.advice(columns)}\n  {_ADVICE}"
        )
    if sample is not None and (recognised := [f for f in best if _recognises(f, sample)]):
        return recognised[0]
    best = [format for format in best if not (format.by_row and format.recognise)] or best
    readers = [format for format in best if sample is not None and _reads(format, sample)]
    by_columns = [format for format in best if not format.by_row]
    return (readers or by_columns or best)[0]


def _best(columns: Collection[str]) -> list[Format]:
    """The matching formats that use the most columns, preferred ones first."""
    fitting = [format for format in load_all() if not format.missing(columns)]
    most = max((format.num_used(columns) for format in fitting), default=0)
    best = [format for format in fitting if format.num_used(columns) == most]
    return sorted(best, key=lambda format: -format.priority)


def recognised_row(rows: Sequence[Row], columns: Collection[str]) -> Row:
    """The row that 'auto' uses: the first one that a format recognises, or the first."""
    best = _best(columns)
    return next((row for row in rows if any(_recognises(f, row) for f in best)), rows[0])


def _recognises(format: Format, row: Row) -> bool:
    return format.recognise is not None and format.recognise(row)


def _reads(format: Format, row: Row) -> bool:
    try:
        format.convert(row)
    except RowError:
        return False
    return True


def _misfit(format: Format, columns: Collection[str], sample: Row | None) -> str:
    seen = f"format {format.name!r} expects {_quoted(format.columns)}, found {_quoted(columns)}."
    if not _best(columns):
        return f"{seen}\n  {_nearest(columns)}\n  {_columns.advice(columns)}\n  {_ADVICE}"
    fits = _pick(columns, sample).name
    return f"{seen}\n  These columns match format {fits!r}: set {_SETTING} = {fits!r}."


def _nearest(columns: Collection[str]) -> str:
    """Describe the closest formats and their missing columns."""

    def share(format: Format) -> float:
        return 1 - len(format.missing(columns)) / len(format.columns)

    near = sorted((f for f in load_all() if share(f) > 0), key=lambda f: (-share(f), -f.priority))
    # If no column matches, similar spelling finds typos such as 'mesages'.
    near = near or [f for f in load_all() if any(_is_similar(c, columns) for c in f.columns)]
    if not near:
        return "No format has any of these columns."
    missing = (f"{f.name!r} (missing {_quoted(f.missing(columns))})" for f in near[:3])
    return f"Closest formats: {', '.join(missing)}."


def _is_similar(column: str, columns: Collection[str]) -> bool:
    import difflib

    return bool(difflib.get_close_matches(column, list(columns), n=1, cutoff=0.75))


def _quoted(columns: Collection[str]) -> str:
    return ", ".join(repr(str(column)) for column in columns) or "no columns"
