"""`xtuner check-custom-dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _settings

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
    rows, otherwise with 0.
    """
    from xtuner.data.report.check import bad_rows, kept_rows
    from xtuner.data.report.show_tokens import visible
    from xtuner.errors import DataError, count

    parts = _settings.open_data(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=trust_code
    )
    bad = 0
    with _written_to(out) as write:
        for row in bad_rows(parts.settings, **parts.arguments):
            bad += 1
            if bad <= _MAX_PRINTED:
                typer.echo(visible(row))
            write(row)
    if bad > _MAX_PRINTED:
        rest = f"and {bad - _MAX_PRINTED:,} more"
        typer.echo(f"{rest}; see {out}" if out else f"{rest}; --out FILE writes all of them")
    kept = 0
    for kept, row in enumerate(kept_rows(parts.settings, **parts.arguments), start=1):
        if kept <= _MAX_PRINTED:
            typer.echo(visible(f"kept: {row}"))
    try:
        data = parts.build()
    except DataError:
        if not bad:
            raise
    else:
        for line in data.report.lines():
            typer.echo(line)
    typer.echo(f"\n{count(bad, 'bad row')}." if bad else "\nNo bad rows.")
    if kept:
        rows = count(kept, "row is", "rows are")
        typer.echo(f"{rows} used with wrong tool calls (tool_call_errors = 'keep').")
    if bad:
        raise typer.Exit(2)


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
