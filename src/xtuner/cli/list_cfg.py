"""`xtuner list-cfg`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            "-p",
            help="Only names with this in them, in any case; * and ? stand for any text or letter.",
        ),
    ] = "",
) -> None:
    """List the built-in settings, one name a line."""
    from xtuner.config.builtin import catalog
    from xtuner.errors import ConfigError

    names = catalog.names(pattern)
    if not names:
        raise ConfigError(
            f"no built-in name has {pattern!r} in it; a name is made of a model, a recipe "
            "(full, lora, qlora), a data set and epochs, as in internlm2_chat_7b_qlora_oasst1_e3"
        )
    typer.echo("\n".join(names))
    # On stderr, so that the names can be piped into another program.
    typer.echo(f"{len(names)} names; copy one with `xtuner copy-cfg NAME FOLDER`", err=True)
