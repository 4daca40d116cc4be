"""Run one command in several processes that train together, and start them again if they fail.

    launch ──► attempt 0: one process per rank ──► all ended, or one failed ──► the others are ended
                                                        └─► attempt 1, from the last checkpoint

Unlike torchrun this keeps the exit code of the main process, shows its output alone, and waits for
a save to finish after Ctrl-C. On several nodes each has a launcher; they agree through node 0
(`nodes`).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xtuner.parallel.attempt import INTERRUPTED, Attempt, Outcome
from xtuner.parallel.cluster import Cluster
from xtuner.parallel.nodes import Nodes, alone_or_with_others

RESUME = "XTUNER_RESUME"
"""Set to 1 where a process has to resume from the last checkpoint."""


def launch(
    command: Sequence[str],
    cluster: Cluster,
    *,
    max_restarts: int = 0,
    can_resume: Callable[[], bool] = lambda: False,
) -> int:
    """Run `command` in the processes of `cluster` that are on this node, and return the exit code
    of the run.

    It is the main process's unless that is 0 or a signal of ours; then the first failed one's. What
    another than the main process said is shown where it failed first.

    Args:
        command: gets rank and meeting point from its environment.
        cluster: the processes.
        max_restarts: how often the processes are started again after a failure that is not an error
            of the user.
        can_resume: whether there is a checkpoint to go on from, asked on node 0 before a restart.

    Raises:
        LaunchError: the nodes cannot meet.
    """
    resume = False
    with alone_or_with_others(cluster) as nodes, _forwarded() as children:
        for number in itertools.count():
            attempt = Attempt(
                command, cluster, nodes, number, extra={RESUME: "1"} if resume else {}
            )
            children.current = attempt
            outcome = nodes.agree(attempt.run())
            if not _again(outcome, children, number < max_restarts):
                return outcome.code
            resume = nodes.decide(can_resume)
            _tell_restart(nodes, number + 1, max_restarts, resume=resume)
    raise AssertionError  # unreachable: the loop ends by return


def _again(outcome: Outcome, children: _Children, allowed: bool) -> bool:
    return allowed and outcome.restartable and not children.stopped


def _tell_restart(nodes: Nodes, number: int, most: int, *, resume: bool) -> None:
    if nodes.is_first:
        where = "from the last checkpoint" if resume else "from the beginning"
        print(f"\nRestart {number} of {most}, {where}.", file=sys.stderr, flush=True)


class _Children:
    """The processes that signals are passed on to."""

    def __init__(self) -> None:
        self.current: Attempt | None = None
        self.stopped = False

    def receive(self, number: int) -> None:
        """Pass a signal on; Ctrl-C in a terminal reaches the processes by itself."""
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

    One that is ignored stays ignored, as nohup means SIGHUP to be.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    known = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def last_checkpoint_changes(pointer: os.PathLike[str]) -> Callable[[], bool]:
    """A function that tells whether the file `pointer`, which names the last checkpoint, was
    written after this call: a checkpoint of an earlier run is not gone on from."""

    def state() -> int | None:
        try:
            return os.stat(pointer).st_mtime_ns
        except OSError:
            return None

    before = state()
    return lambda: state() not in (None, before)


__all__ = ["INTERRUPTED", "last_checkpoint_changes", "launch", "stop_signals"]
