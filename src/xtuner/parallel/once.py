"""Work that one process does for all, while the others wait without a time limit.

The others look into the store of the run; a collective call would end after its timeout, and keeps
a GPU busy. On several nodes the work is done once where they share the folder that it fills, else
once on each node that does not.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from xtuner.errors import PeerLostError, XTunerError
from xtuner.parallel.processes import Processes

T = TypeVar("T")

NOTICE_SECONDS = 10.0
"""How long a node looks for the file of another one: network file systems show it late."""


class Once:
    """Work that fills a folder.

    Args:
        processes: this process and the others.
        folder: which the work fills; all processes on a node have the same.

    Attributes:
        note: on several nodes, where the work is done; on the main process, after `run`.
    """

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes, self._folder = processes, folder
        self.note = ""

    def run(self, work: Callable[[], T]) -> T:
        """Do `work` here; wait before it where another process fills the folder.

        Raises:
            PeerLostError: the process that was waited for failed.
            XTunerError: of `work`.
        """
        if self._processes.world_size == 1:
            return work()
        with self._visible_file() as name:
            worker = self._worker(name)
            if worker != self._processes.rank:
                self._wait_for(worker)
                return work()
            try:
                done = work()
            except Exception as error:
                first = next(iter(str(error).splitlines()), "")
                self._post(f"done/{worker}", f"{type(error).__name__}: {first}")
                raise
            self._post(f"done/{worker}", "")
            if self._processes.is_main:
                self.note = self._describe()
            return done

    def _worker(self, name: str) -> int:
        """The rank that works for this process."""
        node, leader = self._processes.node, self._processes.node_leader
        if node == 0:
            return 0
        if self._processes.rank == leader:
            self._post(f"sees/{node}", str(int(_appears(self._folder / name))))
        return 0 if self._read(f"sees/{node}") == "1" else leader

    @contextlib.contextmanager
    def _visible_file(self) -> Iterator[str]:
        """A file of the main process by which others see whether they share the folder."""
        if not self._processes.is_main:
            yield self._read("file")
            return
        name = f".shared-{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):  # nodes then work for themselves
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (self._folder / name).touch()
        self._post("file", name)
        try:
            yield name
        finally:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def _describe(self) -> str:
        nodes = range(1, self._processes.nodes)
        apart = [node for node in nodes if self._read(f"sees/{node}") != "1"]
        if not nodes:
            return ""
        if not apart:
            return f"done once for all {len(nodes) + 1} nodes, which share {self._folder}"
        return (
            f"done on {len(apart) + 1} of {len(nodes) + 1} nodes, each for itself: "
            f"{self._folder} is not shared with node {', '.join(map(str, apart))}"
        )

    def _wait_for(self, worker: int) -> None:
        if fault := self._read(f"done/{worker}"):
            raise PeerLostError(f"process {worker} failed, so this one ends: {fault}")

    def _post(self, key: str, value: str) -> None:
        with _store_errors():
            self._processes.store.set(f"once/{key}", value)

    def _read(self, key: str) -> str:
        """The value of a key, once it is there."""
        store: Any = self._processes.store
        with _store_errors():
            while not store.check([f"once/{key}"]):
                time.sleep(0.2)
            return str(store.get(f"once/{key}").decode())


def _appears(file: Path) -> bool:
    end = time.monotonic() + NOTICE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.name in os.listdir(file.parent):  # asks the server, unlike a look at the name
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except XTunerError:
        raise
    except RuntimeError as error:
        raise PeerLostError(
            "the main process of this run ended, so this one cannot continue: see its message"
        ) from error
