"""`xtuner check-custom-dataset`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

_SHOWN = 50


def command(
    config: Annotated[
        str, typer.Argument(help="A settings file, or the name of a built-in config.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the list of all bad rows to a file."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "--cfg-options", metavar="KEY=VALUE", help="Override a setting; repeatable."
        ),
    ] = None,
) -> None:
    """Go through all rows of the data and name each bad one with its line, field and hint.

    Ends with 2 if there is a bad row, with 0 if there is none.
    """
    from xtuner.config.load import load_settings
    from xtuner.data.report.check import bad_rows
    from xtuner.data.report.show_tokens import visible
    from xtuner.errors import DataError
    from xtuner.training.data_parts import DataParts

    parts = DataParts.open(load_settings(config, overrides=overrides or ()))
    count = 0
    with _written_to(out) as write:
        for row in bad_rows(parts.settings, **parts.arguments):
            count += 1
            if count <= _SHOWN:
                typer.echo(visible(row))
            write(row)
    if count > _SHOWN:
        rest = f"and {count - _SHOWN:,} more"
        typer.echo(f"{rest}, all in {out}" if out else f"{rest}; --out FILE writes all of them")
    try:
        data = parts.build()
    except DataError:
        if not count:
            raise
    else:
        for line in data.report.lines():
            typer.echo(line)
    typer.echo(f"\n{count:,} bad {'row' if count == 1 else 'rows'}." if count else "\nNo bad row.")
    if count:
        raise typer.Exit(2)


@contextmanager
def _written_to(path: Path | None) -> Iterator[Callable[[str], object]]:
    """Yield a function that writes a line to the file `path`, if there is to be one."""
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
