"""A progress bar on stderr for the encoding of a source."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2
_SLOW_SECONDS = 2.0


@contextmanager
def progress_bar(name: str, *, total: int, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that shows (size read, rows done). Unless stderr is a terminal, a source
    that takes longer than some seconds is named in a line.

    The bar is drawn when the function is called: a refresh thread would interfere with forking.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield _line_of_slow(name, quiet=quiet)
        return
    columns = (
        TextColumn("Encoding {task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task(name, total=total, rows=0)
        drawn = 0.0

        def show(read: int, rows: int) -> None:
            nonlocal drawn
            bar.update(task, completed=read, rows=rows)
            if time.monotonic() - drawn > _REFRESH_SECONDS:
                bar.refresh()
                drawn = time.monotonic()

        yield show


def _line_of_slow(name: str, *, quiet: bool) -> Callable[[int, int], None]:
    """A function that prints one line after some seconds."""
    due = time.monotonic() + _SLOW_SECONDS
    printed = quiet

    def show(read: int, rows: int) -> None:
        nonlocal printed
        if not printed and time.monotonic() > due:
            printed = True
            print(f"Encoding {name}...", file=sys.stderr, flush=True)

    return show
