"""Count the work of a function instead of timing it: counts are the same on every machine."""

import sys
import tracemalloc


class TooMuchWork(AssertionError):
    """More lines ran than were allowed."""


def lines_run(function, *args, limit=float("inf")):
    """How many lines of Python `function` runs.

    Raises:
        TooMuchWork: as soon as more than `limit` of them have run.
    """
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count > limit:
                raise TooMuchWork(f"more than {limit} lines ran; at {frame.f_code.co_qualname}")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count


def most_memory(function, *args):
    """Peak memory of `function` in Python objects, in bytes."""
    tracemalloc.start()
    try:
        function(*args)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
