"""`xtuner explain`."""

from __future__ import annotations

from typing import Annotated

import typer

from xtuner.cli import _complete, _output

_NARROWEST, _WIDEST = 40, 100
"""Columns of the output."""


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
    """Describe a setting, or list all settings.

    A name of another trainer is explained as well.
    """
    from xtuner.config import explain

    width = max(_NARROWEST, min(_WIDEST, _output.terminal_width() or _WIDEST))
    typer.echo(explain.explain(key, width=width) if key else explain.table(width=width))
