"""`xtuner migrate-cfg`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtuner.errors import count, shell_command


def command(
    old: Annotated[
        Path,
        typer.Argument(metavar="OLD", help="A config of XTuner 0.x, LLaMA-Factory or torchtune."),
    ],
    new: Annotated[
        Path | None,
        typer.Argument(
            metavar="NEW",
            help="The settings file to write. Default: OLD_migrated.py in the working directory.",
        ),
    ] = None,
) -> None:
    """Convert a config of another trainer.

    The config is parsed, never executed. What cannot be converted is listed with its line and the
    reason; a config whose meaning would change is refused.
    """

    from xtuner.migrate.file import migrate

    done = migrate(old, new)
    typer.echo(f"Wrote {done.path}: {done.draft.kind}, {count(len(done.draft.values), 'setting')}")
    for line in done.draft.report():
        typer.echo(line)
    typer.echo(
        f"docs/migrating.md lists differences that affect every run. Train with:\n"
        f"  {shell_command('xtuner', 'train', done.path)}"
    )
