"""Prints lines, wrapped between words in a terminal."""

from __future__ import annotations

import shutil
import sys

import typer

from xtuner.wrapping import wrapped


def echo(text: str, *, err: bool = False) -> None:
    """Print `text`; a terminal gets lines that fit, a file or pipe gets them unchanged."""
    if (width := terminal_width(err=err)) is not None:
        text = wrapped(text, width)
    typer.echo(text, err=err)


def terminal_width(*, err: bool = False) -> int | None:
    """The columns of the terminal; None if the output goes to a file or pipe."""
    stream = sys.stderr if err else sys.stdout
    return shutil.get_terminal_size().columns if stream.isatty() else None
