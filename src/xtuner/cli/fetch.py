"""`xtuner fetch`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A model of the catalog (smollm2_135m_instruct) or on the hub (org/model).",
        ),
    ],
) -> None:
    """Download a model and print its folder."""
    from xtuner.hub.fetch import fetch

    typer.echo(str(fetch(name)))
