"""Detects that this process waits too long for the others, and reports where every process is. A
thread posts the process's status to the run's store, and reads the others' when a collective call
takes longer than `hang_timeout`. It works with every launcher.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from xtuner.parallel import activity

HUNG = 1
"""Exit code of a process that waited too long."""

SILENT_SECONDS = 30.0
"""A process that posts nothing for this long is stopped, or its machine is gone."""

Status = Mapping[str, Any]


class Watch:
    """Watches how long this process waits.

    Args:
        rank: Rank of this process.
        world_size: number of processes.
        limit: Seconds that a collective call may take.
        connect: Opens a separate connection to the store.
    """

    def __init__(
        self, rank: int, world_size: int, *, limit: float, connect: Callable[[], Any]
    ) -> None:
        self._rank, self._world_size, self._limit = rank, world_size, limit
        self._connect = connect
        self._every = min(5.0, limit / 4)
        self._told_of = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xtuner-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            store = self._connect()
            while not self._ended.wait(self._every):
                own = activity.current.status()
                store.set(self._key(self._rank), json.dumps(own))
                if own["seconds"] > self._limit and activity.current.since != self._told_of:
                    self._look(store)
        except RuntimeError:
            return  # the store is gone, so the run has ended

    def _look(self, store: Any) -> None:
        keys = [self._key(rank) for rank in range(self._world_size)]
        found: list[Status] = [
            json.loads(store.get(key)) if store.check([key]) else {} for key in keys
        ]
        waiting = [rank for rank, status in enumerate(found) if self._waits_long(status)]
        if waiting and waiting[0] != self._rank:
            return  # only one of them prints
        self._told_of = activity.current.since
        patient = [rank for rank, status in enumerate(found) if status.get("busy")]
        sys.stdout.flush()
        print(report(found, self._rank, self._limit, patient), file=sys.stderr, flush=True)
        if not patient:
            sys.stderr.flush()
            os._exit(HUNG)

    def _waits_long(self, status: Status) -> bool:
        fresh = time.time() - status.get("time", 0.0) < SILENT_SECONDS
        return fresh and bool(status["seconds"] > self._limit)

    def _key(self, rank: int) -> str:
        return f"watch/{rank}"


def report(found: list[Status], rank: int, limit: float, patient: list[int]) -> str:
    """Report where every process is and what happens next.

    Args:
        found: The last status of each process; empty if it never posted one.
        rank: Rank of the process that waits.
        limit: How long it may wait.
        patient: Ranks that it waits for without a time limit.
    """
    lines = [
        f"\nProcess {rank} has waited for the others for more than {limit:g} s. Where they are:"
    ]
    for other, status in enumerate(found):
        lines.append(f"  process {other}  {_described(status)}")
    if patient:
        lines.append(f"It keeps waiting for process {', '.join(map(str, patient))}.")
    else:
        lines.append(
            "The run ends. Continue with --resume; raise hang_timeout if the process was only slow."
        )
    return "\n".join(lines)


def _described(status: Status) -> str:
    if not status:
        return "has not reported yet"
    silent = time.time() - status["time"]
    stage = f"{status['doing']}, " if status["doing"] else ""
    if status["waits_for"]:
        does = f"waits in {status['waits_for']} for {status['seconds']:.0f} s"
    else:
        does = f"is busy with {status['busy']}" if status["busy"] else "works"
    if silent > SILENT_SECONDS:
        does = (
            f"no sign of life for {silent:.0f} s (stopped, or its machine is gone); before: {does}"
        )
    return f"{stage}{does}: {status['at']}"
