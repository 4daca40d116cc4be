"""`xtuner copy-cfg`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _complete


def command(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name that `xtuner list-cfg` shows.",
            autocompletion=_complete.configs,
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder for the file; created if missing.")
    ],
) -> None:
    """Copy built-in settings to a file.

    Writes FOLDER/NAME_copy.py, to edit and train.
    """
    import textwrap

    from xtuner.config.builtin import catalog
    from xtuner.config.render import render
    from xtuner.errors import ConfigError, shell_command

    suffix = "_copy"
    values = catalog.compose(name, suffix=suffix)
    path = folder / f"{name}{suffix}.py"
    train = shell_command("xtuner", "train", path)
    lines = [f"{name}: edit this file, then run", "", f"    {train}", ""]
    lines += textwrap.wrap(catalog.note(name), width=100, break_on_hyphens=False)
    lines += ["`xtuner explain` lists all settings; those not in this file have their defaults."]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(render(values, title="\n".join(lines)))
    except FileExistsError as error:
        if not path.exists():
            raise ConfigError(f"{folder}: is a file; give a folder") from error
        raise ConfigError(
            f"{path}: already exists and may contain your edits; delete it, rename it, "
            "or give another folder"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error
    own = [source for source in values["data_path"] if source.startswith("./")]
    todo = "Set data_path to your data" if own else "Edit it as needed"
    typer.echo(f"Wrote {path}\n{todo}, then run:\n  {train}")
