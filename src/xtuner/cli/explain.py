"""`xtuner explain`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    key: Annotated[str, typer.Argument(help="A setting; without one, all are listed.")] = "",
) -> None:
    """Say what a setting means, what it takes and what its default is."""
    from xtuner.config import explain

    typer.echo(explain.explain(key) if key else explain.table())
