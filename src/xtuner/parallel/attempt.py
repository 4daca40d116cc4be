"""The processes of one node, from start to end: if one dies or is stopped, the others are ended and
its rank and last message are reported."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from xtuner.parallel.cluster import Cluster
from xtuner.parallel.parent import LAUNCHER

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

PEER_LOST = 75
"""Exit code of a process that ends because another one failed."""

USER_ERROR = 2
"""Exit code of an error that the user must fix: a restart would not help."""

GRACE_SECONDS = 15.0
"""Grace period of the others after one process fails: the main process may still print its
message."""

STOPPED_SECONDS = 30.0
"""How long a process may be stopped (SIGSTOP) before it counts as dead."""

ATTEMPT = "XTUNER_ATTEMPT"
LISTENER = "XTUNER_STORE_FD"

_POLL = 0.05
_LAST = 4000


class Others(Protocol):
    """What an attempt asks of the other nodes; see `xtuner.parallel.nodes`."""

    def failed(self) -> bool:
        """Whether a process of another node has failed, or a node is lost."""
        ...

    def fail(self, message: str) -> None:
        """Tell the other nodes that a process of this one failed."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt.

    Attributes:
        code: Exit code of the run.
        restartable: Whether a restart may help.
        message: Which process failed, and how; empty if none did.
    """

    code: int
    restartable: bool = False
    message: str = ""


class Attempt:
    """The processes of one node.

    Args:
        command: The command of each process.
        cluster: Which ranks are on this node.
        nodes: Reports failures on other nodes.
        number: Number of earlier attempts.
        extra: Additional environment variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        cluster: Cluster,
        nodes: Others,
        number: int,
        *,
        extra: Mapping[str, str],
    ) -> None:
        self._command, self._cluster, self._nodes, self._number = command, cluster, nodes, number
        self._extra = extra
        self._children: list[subprocess.Popen[bytes]] = []
        self._logs: list[IO[bytes]] = []
        self._failed: list[int] = []
        self._victims: set[int] = set()  # ended by the launcher because another one failed
        self._stopped = _StoppedFor()

    def run(self) -> Outcome:
        """Start the processes and wait until all have ended."""
        try:
            self._start()
            return self._wait()
        finally:
            for child in self._children:
                child.kill()
                child.wait()
            for log in self._logs:
                log.close()

    def send_signal(self, number: int) -> None:
        """Pass a signal on."""
        for child in self._children:
            child.send_signal(number)

    def _start(self) -> None:
        cluster = self._cluster
        listener = self._listener()
        environment = self._environment(listener)
        for local in range(cluster.processes):
            rank = cluster.first_rank + local
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(local)}
            inherited = (listener.fileno(),) if listener and rank == 0 else ()
            if inherited:
                ranks[LISTENER] = str(inherited[0])
            log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the run is over)
            self._logs.append(log)
            output = None if rank == 0 else log
            self._children.append(
                subprocess.Popen(
                    self._command,
                    env={**environment, **ranks},
                    stdout=output,
                    stderr=output,
                    pass_fds=inherited,
                )
            )
        if listener:
            listener.close()

    def _listener(self) -> socket.socket | None:
        """On one node the main process hosts the store; on several nodes, node 0's launcher
        does."""
        return self._cluster.listen() if self._cluster.nodes == 1 else None

    def _environment(self, listener: socket.socket | None) -> dict[str, str]:
        cluster = self._cluster
        port = listener.getsockname()[1] if listener else cluster.port
        environment = {
            **os.environ,
            "WORLD_SIZE": str(cluster.world_size),
            "LOCAL_WORLD_SIZE": str(cluster.processes),
            "GROUP_RANK": str(cluster.node_rank),
            "MASTER_ADDR": cluster.address,
            "MASTER_PORT": str(port),
            ATTEMPT: str(self._number),
            LAUNCHER: str(os.getpid()),
            **self._extra,
        }
        threads = max(1, (os.cpu_count() or 1) // cluster.processes)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        if interface := cluster.interface():
            environment.setdefault("GLOO_SOCKET_IFNAME", interface)
        return environment

    def _wait(self) -> Outcome:
        deadline = float("inf")
        while any(child.poll() is None for child in self._children):
            now = time.monotonic()
            self._look()
            if self._failed or self._nodes.failed() or PEER_LOST in self._codes():
                deadline = min(deadline, now if self._stopped.ended else now + GRACE_SECONDS)
            if now > deadline or 0 in self._failed_ranks():
                self._end()
            time.sleep(_POLL)
        self._look()  # all may have ended since the last check
        return self._outcome()

    def _look(self) -> None:
        """Detect which process failed first, and tell the other nodes."""
        if self._failed:
            return
        failed = [index for index in self._first_failed() if index not in self._victims]
        if failed:
            self._failed = failed
            self._nodes.fail(self._describe(failed[0]))

    def _codes(self) -> list[int | None]:
        return [child.poll() for child in self._children]

    def _first_failed(self) -> list[int]:
        """The indices of processes that failed on their own or are stopped."""
        codes = enumerate(self._codes())
        failed = [index for index, code in codes if code not in (None, 0, PEER_LOST)]
        return failed or self._stopped.longer_than(STOPPED_SECONDS, self._children)

    def _failed_ranks(self) -> list[int]:
        return [self._cluster.first_rank + local for local in self._failed]

    def _end(self) -> None:
        alive = {index for index, code in enumerate(self._codes()) if code is None}
        self._victims |= alive - self._stopped.ended
        for child in self._children:
            child.kill()

    def _outcome(self) -> Outcome:
        codes = [child.returncode for child in self._children]
        failed = self._failed or [i for i, code in enumerate(codes) if code]
        failed = [index for index in failed if index not in self._victims]
        firsts = [index for index in failed if codes[index] != PEER_LOST] or failed
        if firsts and self._cluster.node_rank == 0 and codes[0] < 0:
            print(file=sys.stderr)  # killed, the main process may leave a line unfinished
        for local in firsts:  # the first to fail knows the cause; later messages are consequences
            self._show(local, codes[local])
        if not firsts:
            return Outcome(1, restartable=True) if any(codes) else Outcome(0)
        code, main = codes[firsts[0]], codes[0]
        if self._cluster.node_rank == 0 and main > 0 and main != PEER_LOST:
            code = main
        again = codes[firsts[0]] not in (USER_ERROR, INTERRUPTED)
        code = USER_ERROR if code == PEER_LOST else code if code > 0 else 128 - code
        return Outcome(code, restartable=again, message=self._describe(firsts[0]))

    def _show(self, local: int, code: int) -> None:
        rank = self._cluster.first_rank + local
        if code == INTERRUPTED or (rank == 0 and code > 0):
            return  # it has printed the reason itself
        text = f"{self._describe(local)}."
        if rank:
            self._logs[local].seek(0)
            output = self._logs[local].read().decode(errors="replace")[-_LAST:].strip()
            text += f" Its last output:\n{output}" if output else " It printed nothing."
        print(text, file=sys.stderr, flush=True)

    def _describe(self, local: int) -> str:
        """Describe what happened to a process."""
        rank = self._cluster.first_rank + local
        where = f" on node {self._cluster.node_rank}" if self._cluster.nodes > 1 else ""
        who = f"Process {rank}{where}"
        if local in self._stopped.ended:
            return (
                f"{who} was stopped for {STOPPED_SECONDS:.0f} s (SIGSTOP), so the run was ended. "
                "Continue with --resume"
            )
        code = self._children[local].poll()
        if code is None or code >= 0:
            return f"{who} failed with exit code {code}"
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"{who} was killed by {name}{hint}. Earlier checkpoints are untouched"


class _StoppedFor:
    """How long processes have been stopped, measured by this process's own polls: no time passes
    while it is stopped itself, by Ctrl-Z or a scheduler that suspends the job."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._next = 0.0
        self.ended: set[int] = set()

    def longer_than(self, limit: float, children: Sequence[subprocess.Popen[bytes]]) -> list[int]:
        """The indices of `children` that have been stopped for more than `limit` seconds."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + 1.0
        for index, child in enumerate(children):
            stopped = child.poll() is None and _is_stopped(child.pid)
            self._seconds[index] = self._seconds.get(index, 0.0) + 1.0 if stopped else 0.0
        self.ended = {index for index, seconds in self._seconds.items() if seconds > limit}
        return sorted(self.ended)


def _is_stopped(pid: int) -> bool:
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
