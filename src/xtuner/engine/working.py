"""Shows what a run is doing during slow steps, and prints labelled lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.errors import LiveError

from xtuner.wrapping import wrapped

LABEL = 13
"""Width of the label at the beginning of a line."""


def say(console: Console, line: str) -> None:
    """Print a line that begins with a label. In a terminal it wraps between words, aligned with its
    text; paths and other long words are not broken, so that they can be copied.
    """
    console.print(fitted(console, line, indent=LABEL), markup=False, soft_wrap=True)


def fitted(console: Console, text: str, *, indent: int) -> str:
    """`text` wrapped between words for a terminal, unchanged for a file; see `wrapping.wrapped`."""
    return wrapped(text, console.width, indent=indent) if console.is_terminal else text


@contextlib.contextmanager
def working(console: Console, text: str) -> Iterator[None]:
    """Show `text` while the block runs: with a spinner in a terminal, otherwise as a line.

    Args:
        text: What is being done, such as "Loading the model".
    """
    status = console.status(f"{text}...")
    if not console.is_terminal or console.quiet:
        console.print(f"{text}...", markup=False)
        yield
        return
    try:
        status.start()
    except LiveError:  # the progress bar is active
        console.print(f"{text}...", markup=False)
        yield
        return
    try:
        yield
    finally:
        status.stop()
