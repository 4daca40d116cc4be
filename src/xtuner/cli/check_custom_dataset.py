"""`xtuner check-custom-dataset`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _output, _settings
from xtuner.errors import count

_MAX_PRINTED = 50


def command(
    config: _settings.Config,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the list of all bad rows to this file."),
    ] = None,
    overrides: _settings.Overrides = None,
    trust_remote_code: _settings.TrustRemoteCode = False,
    trust_code: _settings.TrustCode = False,
) -> None:
    """Check every row of the data.

    Prints each bad row with its line, the field, and how to fix it. Exits with 2 if there are bad
    rows or files, otherwise with 0.
    """
    parts = _settings.open_data(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=trust_code
    )
    from xtuner.data.report.check import bad_rows, kept_rows
    from xtuner.data.report.show_tokens import visible
    from xtuner.errors import DataError

    faults, unusable = 0, list[str]()
    with _written_to(out) as write:
        rows = bad_rows(parts.settings, **parts.arguments, unusable=unusable)
        for faults, line in enumerate(itertools.chain(rows, unusable), start=1):
            if faults <= _MAX_PRINTED:
                _output.echo(visible(line))
            write(line)
    if faults > _MAX_PRINTED:
        rest = f"and {faults - _MAX_PRINTED:,} more"
        _output.echo(f"{rest}; see {out}" if out else f"{rest}; --out FILE writes all of them")
    kept = 0
    for kept, row in enumerate(kept_rows(parts.settings, **parts.arguments), start=1):
        if kept <= _MAX_PRINTED:
            _output.echo(visible(f"kept: {row}"))
    try:
        data = parts.build()
    except DataError:
        if not faults:
            raise
    else:
        for line in data.report.lines():
            _output.echo(line)
    typer.echo(f"\n{_summary(faults - len(unusable), len(unusable))}.")
    if kept:
        rows_are = count(kept, "row is", "rows are")
        _output.echo(f"{rows_are} used with wrong tool calls (tool_call_errors = 'keep').")
    if faults:
        raise typer.Exit(2)


def _summary(rows: int, files: int) -> str:
    """The number of bad rows, and of files or sources without usable rows."""
    found = [count(rows, "bad row")] if rows else []
    found += [f"{count(files, 'file')} that cannot be read"] if files else []
    return ", ".join(found) or "No bad rows"


@contextmanager
def _written_to(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield a function that writes a line to the file `path`, or does nothing if it is None."""
    from xtuner.errors import DataError

    if path is None:
        yield lambda line: None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written: {error.strerror}") from error
    with file:
        yield lambda line: file.write(f"{line}\n")
