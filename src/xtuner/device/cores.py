"""Binds the processes of a run to separate CPU cores.

Processes that exchange messages wake each other, and the scheduler may then keep them on one core.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


@cache
def bind_to_share(index: int, count: int) -> int | None:
    """Bind this thread, and threads that it starts later, to its share of the physical cores.

    Args:
        index: The number of this process on its machine, from 0.
        count: Processes on the machine.

    Returns:
        The number of logical cores in the share; None if the process is not bound, because there
        are fewer physical cores than processes or the system cannot bind.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    if allowed is None or count == 1:
        return None
    share = share_of(physical_cores(allowed(0)), index, count)
    if not share:
        return None
    os.sched_setaffinity(0, share)
    return len(share)


def physical_cores(allowed: Iterable[int]) -> list[set[int]]:
    """The logical cores `allowed`, grouped by the physical core that they share."""
    cores: dict[str, set[int]] = {}
    for number in sorted(allowed):
        file = _TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list"
        try:
            name = file.read_text(encoding="ascii").strip()
        except OSError:
            name = str(number)
        cores.setdefault(name, set()).add(number)
    return list(cores.values())


def share_of(cores: list[set[int]], index: int, count: int) -> set[int]:
    """An equal share of `cores`, neighbors together; empty if there are too few."""
    each = len(cores) // count
    return set().union(*cores[index * each : (index + 1) * each])
