"""`xtuner explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from xtuner.cli import _complete


def command(
    key: Annotated[
        str,
        typer.Argument(
            metavar="SETTING",
            help="A setting; omit it to list all settings.",
            autocompletion=_complete.settings,
        ),
    ] = "",
) -> None:
    """Describe a setting, or list all settings."""
    from xtuner.config import explain

    typer.echo(explain.explain(key) if key else explain.table())
