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
            help="List only names that contain this, case-insensitively; * and ? are wildcards.",
        ),
    ] = "",
) -> None:
    """List the built-in settings, one name per line."""
    from xtuner.config.builtin import catalog
    from xtuner.errors import ConfigError, count

    names = catalog.names(pattern)
    if not names:
        raise ConfigError(
            f"no built-in name contains {pattern!r}; a name consists of a model, a recipe "
            "(full, lora, qlora), a data set and epochs, as in internlm2_chat_7b_qlora_oasst1_e3"
        )
    typer.echo("\n".join(names))
    # On stderr, so that the names can be piped into another program.
    typer.echo(
        f"{count(len(names), 'name')}; copy one with `xtuner copy-cfg NAME FOLDER`", err=True
    )
