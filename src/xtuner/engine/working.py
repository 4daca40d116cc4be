"""Say what is being done while it takes time, so that no part of a run is silent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.errors import LiveError


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
