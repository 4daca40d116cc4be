"""Runs one command in several processes that train together, and restarts them if they fail.

    launch ──► attempt 0: one process per rank ──► all ended, or one failed ──► the others are ended
                                                        └─► attempt 1, from the last checkpoint

Unlike torchrun, this returns the main process's exit code, shows only its output, and waits for a
save to finish after Ctrl-C. Each node has its own launcher; they coordinate through node 0
(`nodes`).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xtuner.parallel.attempt import Attempt
from xtuner.parallel.cluster import Cluster
from xtuner.parallel.nodes import Nodes, alone_or_with_others

RESUME = "XTUNER_RESUME"
"""Set to 1 if a process must resume from the last checkpoint."""


def launch(
    command: Sequence[str],
    cluster: Cluster,
    *,
    max_restarts: int = 0,
    can_resume: Callable[[], bool] = lambda: False,
) -> int:
    """Run `command` in the processes of `cluster` that are on this node, and return the exit code
    of the run.

    This is the main process's exit code, unless that is 0 or a signal from the launcher; then the
    exit code of the first process to fail. If that is not the main process, its output is shown.

    Args:
        command: The command; it reads its rank and the rendezvous address from its environment.
        cluster: The processes.
        max_restarts: How often the processes are restarted after a failure that is not a user
            error.
        can_resume: Returns whether there is a checkpoint to resume from; called on node 0 before a
            restart.

    Raises:
        LaunchError: The nodes cannot connect.
    """
    resume = False
    with alone_or_with_others(cluster) as nodes, _forwarded() as children:
        for number in itertools.count():
            attempt = Attempt(
                command, cluster, nodes, number, extra={RESUME: "1"} if resume else {}
            )
            children.current = attempt
            outcome = nodes.agree(attempt.run())
            if children.stopped or not outcome.restartable or number >= max_restarts:
                return outcome.code
            resume = nodes.decide(can_resume)
            _tell_restart(nodes, number + 1, max_restarts, resume=resume)
    raise AssertionError  # unreachable: the loop returns


def _tell_restart(nodes: Nodes, number: int, most: int, *, resume: bool) -> None:
    if nodes.is_first:
        where = "from the last checkpoint" if resume else "from the beginning"
        print(f"\nRestart {number} of {most}, {where}.", file=sys.stderr, flush=True)


class _Children:
    """The processes that receive forwarded signals."""

    def __init__(self) -> None:
        self.current: Attempt | None = None
        self.stopped = False

    def receive(self, number: int) -> None:
        """Forward a signal; Ctrl-C in a terminal reaches the processes directly."""
        self.stopped = True
        if self.current is not None and number != signal.SIGINT:
            self.current.send_signal(number)


@contextmanager
def _forwarded() -> Iterator[_Children]:
    children = _Children()
    before = {
        number: signal.signal(number, lambda number, frame: children.receive(number))
        for number in stop_signals()
    }
    try:
        yield children
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop: Ctrl-C, and what schedulers (Slurm) and terminals send.

    A signal that is ignored stays ignored, such as SIGHUP under nohup.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    known = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def last_checkpoint_changes(pointer: os.PathLike[str]) -> Callable[[], bool]:
    """Return a function that tells whether the file `pointer`, which names the last checkpoint, was
    written after this call: checkpoints of earlier runs are not resumed."""

    def state() -> int | None:
        try:
            return os.stat(pointer).st_mtime_ns
        except OSError:
            return None

    before = state()
    return lambda: state() not in (None, before)
