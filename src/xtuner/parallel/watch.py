"""Detects that the processes of a run hang, and reports where each of them is. It works with every
launcher.

A thread of each process posts its status to the run's store. The first process that is not
silent reads all of them once no process makes progress:

    all in an optimizer step      the run ends after `limit_of_step`, the first step excepted
    a process reads data, saves,  the others wait and report what they wait for
    evaluates, runs a hook, ...
    all wait for one another      the run ends after `WAITING_SECONDS`
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtuner.parallel import activity
from xtuner.parallel.attempt import PEER_LOST

HUNG = 1
"""Exit code of a process that hangs."""

SILENT_SECONDS = 30.0
"""A process that posts nothing for this long is stopped, or its machine is lost."""

WAITING_SECONDS = 600.0
"""How long the processes may wait for one another outside an optimizer step."""

STEP_SECONDS = 45.0
"""How long a part of an optimizer step may always take."""

STEP_FACTOR = 10.0
"""How many times longer than before a part of an optimizer step may take."""

FIRST_STEP_SECONDS = 6000.0
"""How long a part of the first step may take: a compilation, or a large model on a slow CPU."""

EVERY_SECONDS = 5.0
"""How often a process posts its status."""

_SUSPENDED = 10.0

Status = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What the statuses of all processes say.

    Attributes:
        seconds: How long no process has made progress.
        limit: How long that is allowed.
        patient: Ranks that the others wait for without a limit.
        stuck: Ranks that the others wait for if the run hangs; empty if that cannot be determined.
    """

    seconds: float
    limit: float
    patient: list[int]
    stuck: list[int]

    @property
    def late(self) -> bool:
        """Whether the limit has passed."""
        return self.seconds > self.limit


def judge(
    statuses: Sequence[Status], silent: Sequence[float], timeout: float | None = None
) -> Verdict:
    """Judge whether a run hangs.

    Args:
        statuses: The last status of each process; empty if it never posted one.
        silent: Seconds since each of them was posted.
        timeout: The setting `hang_timeout`; None is 'auto'.
    """
    ranks = range(len(statuses))
    lost = [rank for rank in ranks if silent[rank] > SILENT_SECONDS]
    known = [(status, silent[rank]) for rank, status in enumerate(statuses) if status]
    quiet = min((status["quiet"] + age for status, age in known), default=0.0)
    waiting = {rank for rank in ranks if statuses[rank].get("waits_for")}
    patient = [r for r in ranks if r not in waiting and _may_take_long(statuses[r], silent[r])]
    works = [r for r in ranks if r not in waiting and not statuses[r].get("blocked")]
    stuck = lost or ([] if len(works) == len(ranks) else works)
    limit = timeout or limit_of_step(statuses)
    return Verdict(quiet, limit, patient, stuck)


def limit_of_step(statuses: Sequence[Status]) -> float:
    """How long no process may make progress: in an optimizer step after the first, a multiple of
    the time that its slowest part has taken so far."""
    if any(not status or status["busy"] for status in statuses):
        return WAITING_SECONDS
    slowest = max(float(status["expected"]) for status in statuses)
    return max(STEP_SECONDS, STEP_FACTOR * slowest)


def _may_take_long(status: Status, silent: float) -> bool:
    """Whether a process that is in no collective call does work of unknown length. Such work may
    block the thread that posts the status."""
    if silent > WAITING_SECONDS:
        return False
    if not status:
        return True
    first = status["busy"] == activity.FIRST_STEP
    return bool(status["busy"]) and not (first and status["quiet"] > FIRST_STEP_SECONDS)


class Watch:
    """Posts the status of this process, and ends it if the run hangs.

    Args:
        rank: Rank of this process.
        world_size: Number of processes.
        timeout: The setting `hang_timeout`; None is 'auto'.
        connect: Opens a separate connection to the store.
    """

    def __init__(
        self, rank: int, world_size: int, *, timeout: float | None, connect: Callable[[], Any]
    ) -> None:
        self._rank, self._world_size, self._timeout = rank, world_size, timeout
        self._connect = connect
        self._every = min(EVERY_SECONDS, (timeout or STEP_SECONDS) / 4)
        self._reported = False
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xtuner-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            store, before = self._connect(), time.monotonic()
            while not self._ended.wait(self._every):
                lost = time.monotonic() - before - self._every
                if lost > _SUSPENDED:  # Ctrl-Z, or a scheduler that suspends the job
                    activity.current.forgive(lost)
                    self._seen = {}
                before = time.monotonic()
                own = activity.current.status()
                store.set(self._key(self._rank), json.dumps(own))
                if store.check([_END]):
                    self._end(json.loads(store.get(_END)))
                elif own["quiet"] > (self._timeout or STEP_SECONDS) and self._is_first(store):
                    self._look(store)
        except RuntimeError:
            return  # the store is closed, so the run has ended

    def _is_first(self, store: Any) -> bool:
        """Whether all processes before this one are silent."""
        return all(self._read(store, rank)[1] > SILENT_SECONDS for rank in range(self._rank))

    def _read(self, store: Any, rank: int) -> tuple[Status, float]:
        """The last status of a process, and for how many seconds it has not changed."""
        key, now = self._key(rank), time.monotonic()
        value = bytes(store.get(key)) if store.check([key]) else b""
        before, since = self._seen.get(rank, (None, now))
        self._seen[rank] = (value, since if value == before else now)
        return (json.loads(value) if value else {}), now - self._seen[rank][1]

    def _look(self, store: Any) -> None:
        found = [self._read(store, rank) for rank in range(self._world_size)]
        statuses, silent = [status for status, _ in found], [age for _, age in found]
        verdict = judge(statuses, silent, self._timeout)
        if not verdict.late:
            self._reported = False
            return
        if not verdict.patient:
            store.set(_END, json.dumps(verdict.stuck))
        if not (verdict.patient and self._reported):
            sys.stdout.flush()
            print(report(statuses, silent, verdict), file=sys.stderr, flush=True)
        self._reported = True
        if not verdict.patient:
            alive = [rank for rank in verdict.stuck if silent[rank] <= SILENT_SECONDS]
            self._end(verdict.stuck if alive else [self._rank])

    def _end(self, stuck: Sequence[int]) -> None:
        """End this process: at once if it is stuck, otherwise after the stuck ones have."""
        if self._rank in stuck:
            print(f"\nProcess {self._rank} made no progress. Its threads:", file=sys.stderr)
            sys.stderr.flush()
            faulthandler.dump_traceback(sys.__stderr__ or 2)
            os._exit(HUNG)
        self._ended.wait(2 * self._every)
        os._exit(PEER_LOST if stuck else HUNG)

    def _key(self, rank: int) -> str:
        return f"watch/{rank}"


_END = "watch/end"
"""The key under which the ranks are that hang."""


def report(statuses: Sequence[Status], silent: Sequence[float], verdict: Verdict) -> str:
    """Report where every process is and what happens next.

    Args:
        statuses: The last status of each process; empty if it never posted one.
        silent: Seconds since each of them was posted.
        verdict: The judgement on them.
    """
    lines = [f"\nNo process has made progress for {verdict.seconds:.0f} s. Where they are:"]
    for rank, status in enumerate(statuses):
        lines.append(f"  process {rank}  {_described(status, silent[rank])}")
    if verdict.patient:
        lines.append(f"The others keep waiting for process {_listed(verdict.patient)}.")
        return "\n".join(lines)
    if verdict.stuck:
        lines.append(f"The run hangs at process {_listed(verdict.stuck)}, so it ends.")
    else:
        lines.append("The run hangs, so it ends.")
    lines.append(
        f"Continue with --resume. If the process was only slow, set hang_timeout to more than "
        f"{verdict.limit:.0f} seconds."
    )
    return "\n".join(lines)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _described(status: Status, silent: float) -> str:
    if not status:
        return "has not reported yet"
    stage = f"{status['doing']}, " if status["doing"] else ""
    if status["waits_for"]:
        does = f"waits in {status['waits_for']} for {status['seconds']:.0f} s"
    elif status["busy"]:
        does = f"is busy with {status['busy']}"
    elif status["blocked"]:
        does = f"waits in a layer for {status['quiet']:.0f} s"
    else:
        does = f"works, without progress for {status['quiet']:.0f} s"
    if silent > SILENT_SECONDS:
        does = (
            f"no sign of life for {silent:.0f} s (stopped, or its machine is lost); before: {does}"
        )
    return f"{stage}{does}: {status['at']}"
