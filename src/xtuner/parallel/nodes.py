"""The launchers of several nodes: each tells the others when one of its processes fails, and node 0
decides how the run continues. They share a torch.distributed store that node 0's launcher hosts, so
it outlives the processes. Each attempt uses its own keys, because stale keys make restarted
processes hang. A single node needs none of this, and its launcher does not import torch.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from xtuner.errors import LaunchError
from xtuner.parallel.attempt import GRACE_SECONDS, Outcome
from xtuner.parallel.cluster import Cluster

JOIN_SECONDS = 600
"""How long a node waits for the others to join."""

SILENT_SECONDS = 30.0
"""A node without a sign of life for this long is considered lost."""

_EVERY = 1.0


class Nodes:
    """One node alone."""

    is_first = True

    def failed(self) -> bool:
        """Whether a process on another node failed or a node is lost."""
        return False

    def fail(self, message: str) -> None:
        """Tell the other nodes that a process on this one failed."""

    def agree(self, outcome: Outcome) -> Outcome:
        """End the attempt on all nodes and return its outcome."""
        return outcome

    def decide(self, question: Callable[[], bool]) -> bool:
        """The result on node 0, returned on every node."""
        return question()


class SeveralNodes(Nodes):
    """One of several nodes.

    Args:
        store: The store that all launchers share.
        cluster: The run, as seen from this node.
    """

    def __init__(self, store: Any, cluster: Cluster) -> None:
        self._store, self._cluster = store, cluster
        self.is_first = cluster.node_rank == 0
        self._attempt = 0
        self._failed, self._lost = False, ""
        self._next = 0.0
        self._seen: dict[int, tuple[bytes, float]] = {}

    def failed(self) -> bool:
        """Whether a process on another node failed or a node is lost; checks once per second."""
        now = time.monotonic()
        if now >= self._next and not self._failed:
            self._next = now + _EVERY
            try:
                self._store.set(self._alive(self._cluster.node_rank), f"{now}")
                self._failed = self._store.check([self._key("failed")])
                if lost := self._silent(now):
                    self.fail(f"Node {lost} gave no sign of life for {SILENT_SECONDS:.0f} s")
            except RuntimeError:
                self._failed, self._lost = True, "node 0 is no longer reachable"
        return self._failed

    def _silent(self, now: float) -> int | None:
        """The first other node that does not respond; node 0 checks all nodes."""
        for node in range(1, self._cluster.nodes) if self.is_first else ():
            key = self._alive(node)
            value = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._seen.get(node, (b"", now))
            self._seen[node] = (value, since if value == before else now)
            if now - self._seen[node][1] > SILENT_SECONDS:
                return node
        return None

    def fail(self, message: str) -> None:
        """Tell the other nodes; only the first failure counts."""
        if not self._failed:
            self._failed = True
            try:
                self._store.compare_set(self._key("failed"), "", message)
            except RuntimeError:
                self._lost = "node 0 is no longer reachable"

    def agree(self, outcome: Outcome) -> Outcome:
        """Wait until all nodes end; node 0 derives the outcome from the first one to fail."""
        try:
            return self._agreed(outcome)
        except RuntimeError:
            lost = self._lost or "node 0 is no longer reachable"
            print(f"{lost[0].upper()}{lost[1:]}, so this node ends.", file=sys.stderr)
            return Outcome(outcome.code or 1)

    def _agreed(self, outcome: Outcome) -> Outcome:
        store, own = self._store, self._cluster.node_rank
        ended = f"{outcome.code} {int(outcome.restartable)} {int(bool(outcome.message))}"
        store.set(self._key(f"ended/{own}"), ended)
        if self.is_first:
            store.set(self._key("verdict"), self._judge(outcome))
        while not store.check([self._key("verdict")]):
            store.set(self._alive(own), f"{time.monotonic()}")
            time.sleep(0.2)
        code, again = store.get(self._key("verdict")).decode().split(" ", 1)
        message = self._message()
        if message and f"on node {own} " not in message:
            print(f"{message}. See the output of that node.", file=sys.stderr, flush=True)
        self._attempt += 1
        self._failed, self._seen = False, {}
        return Outcome(int(code), restartable=again == "1", message=message)

    def _message(self) -> str:
        key = self._key("failed")
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _judge(self, outcome: Outcome) -> str:
        """Exit code and whether to restart, from the node that failed first, otherwise from node
        0."""
        patience = time.monotonic() + GRACE_SECONDS + SILENT_SECONDS if outcome.code else math.inf
        keys = [self._key(f"ended/{node}") for node in range(self._cluster.nodes)]
        while not self._store.check(keys) and time.monotonic() < patience and not self._dead():
            time.sleep(0.1)
        ends = [
            self._store.get(key).decode().split() if self._store.check([key]) else ["1", "0", "1"]
            for key in keys
        ]
        codes = [int(code) for code, _, _ in ends]
        code = outcome.code or next((code for code in codes if code), 0)
        mine = [again for code, again, own in ends if own == "1"]
        again = bool(mine) and all(flag == "1" for flag in mine)
        return f"{code} {int(again)}"

    def _dead(self) -> bool:
        """Whether a node is lost while this one waits for the others."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _EVERY
            return self._silent(now) is not None
        return False

    def decide(self, question: Callable[[], bool]) -> bool:
        """Node 0's result."""
        key = f"decision/{self._attempt}"
        if self.is_first:
            self._store.set(key, str(int(question())))
        self._store.wait([key], timedelta(seconds=4 * SILENT_SECONDS))
        return bool(self._store.get(key) == b"1")

    def _key(self, name: str) -> str:
        return f"launchers/{self._attempt}/{name}"

    def _alive(self, node: int) -> str:
        return f"launchers/alive/{node}"


@contextmanager
def alone_or_with_others(cluster: Cluster) -> Iterator[Nodes]:
    """Connect to the launchers of the other nodes, if there are any.

    Raises:
        LaunchError: They do not join in time.
    """
    if cluster.nodes == 1:
        yield Nodes()
        return
    first = cluster.node_rank == 0
    print(
        f"Node {cluster.node_rank} of {cluster.nodes}, ranks {cluster.first_rank} to "
        f"{cluster.first_rank + cluster.processes - 1}: "
        + ("waiting for the other nodes at " if first else "joining node 0 at ")
        + f"{cluster.address}:{cluster.port}"
        + ("" if first else "; the run's output is there"),
        file=sys.stderr,
        flush=True,
    )
    store = _meet(cluster)
    yield SeveralNodes(store, cluster)
    # The others read the outcome from node 0's store before it closes.
    store.set(f"launchers/left/{cluster.node_rank}", "1")
    if first:
        _last_to_leave(store, cluster)


def _meet(cluster: Cluster) -> Any:
    from torch._C._distributed_c10d import TCPStore

    first = cluster.node_rank == 0
    listener = cluster.listen() if first else None
    try:
        store = TCPStore(
            cluster.address,
            cluster.port,
            is_master=first,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
        store.set(f"launchers/came/{cluster.node_rank}", str(cluster.processes))
        keys = [f"launchers/came/{node}" for node in range(cluster.nodes)]
        store.wait(keys, timedelta(seconds=JOIN_SECONDS))
        counts = {int(store.get(key)) for key in keys}
    except RuntimeError as error:
        raise LaunchError(
            f"the {cluster.nodes} nodes did not connect at {cluster.address}:{cluster.port} within "
            f"{JOIN_SECONDS} s: start the same command on every node, each with its own "
            "--node-rank (NODE_RANK), and let the firewall pass this port"
        ) from error
    if len(counts) > 1:
        seen = ", ".join(map(str, sorted(counts)))
        raise LaunchError(
            f"the nodes have different numbers of processes ({seen}): "
            "give the same --nproc (NPROC_PER_NODE) on each"
        )
    store.set_timeout(timedelta(seconds=SILENT_SECONDS))
    return store


def _last_to_leave(store: Any, cluster: Cluster) -> None:
    keys = [f"launchers/left/{node}" for node in range(cluster.nodes)]
    end = time.monotonic() + GRACE_SECONDS
    while not store.check(keys) and time.monotonic() < end:
        time.sleep(0.1)
