"""Say what is being done while it takes time, so that no part of a run is silent; long lines."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.errors import LiveError

LABEL = 13
"""Columns of the label that a line of a run begins with."""
_NARROW = 40


def say(console: Console, line: str) -> None:
    """Print a line that begins with a label; in a terminal it wraps at words, below its text.

    Paths and other long words stay whole, so that they can be copied.
    """
    if console.is_terminal and console.width >= _NARROW:
        parts = (
            textwrap.wrap(
                part,
                console.width,
                subsequent_indent=" " * LABEL,
                break_long_words=False,
                break_on_hyphens=False,
                drop_whitespace=True,
            )
            for part in line.split("\n")
        )
        line = "\n".join("\n".join(part) for part in parts)
    console.print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Show `text` while the block runs: with a moving sign in a terminal, else as a line.

    Args:
        console: of the run.
        text: what is being done, such as "Loading the model".
    """
    status = console.status(f"{text}...")
    if not console.is_terminal or console.quiet:
        console.print(f"{text}...", markup=False)
        yield
        return
    try:
        status.start()
    except LiveError:  # the bar of the steps is there
        console.print(f"{text}...", markup=False)
        yield
        return
    try:
        yield
    finally:
        status.stop()
