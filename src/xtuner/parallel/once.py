"""Work that one process does for all, while the others wait without a time limit. The others poll
the run's store; a collective call would time out and keep a GPU busy. On several nodes the work is
done once if they share the folder that it fills, otherwise once on each node that does not share
it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from xtuner.errors import LaunchError, PeerLostError, XTunerError, brief
from xtuner.parallel.processes import Processes

T = TypeVar("T")

NOTICE_SECONDS = 10.0
"""How long a node looks for another node's file: network file systems show it with a delay."""


class Once:
    """Work that fills a folder.

    Args:
        processes: The process group.
        folder: The folder that the work fills, the same for all processes on a node.

    Attributes:
        note: With several nodes, where the work is done; set by `run` on the main process.
    """

    def __init__(self, processes: Processes, folder: Path) -> None:
        self._processes, self._folder = processes, folder
        self.note = ""

    def run(self, work: Callable[[], T]) -> T:
        """Run `work`; if another process fills the folder, wait for it first.

        Raises:
            PeerLostError: The process that fills the folder failed.
            XTunerError: Raised by `work`.
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
                self._post(f"done/{worker}", brief(error))
                raise
            self._post(f"done/{worker}", "")
            if self._processes.is_main:
                self.note = self._describe()
            return done

    def on_main(self, key: str, work: Callable[[], None]) -> None:
        """Run `work` on the main process; the others go on once it is done.

        Raises:
            PeerLostError: It failed on the main process.
            XTunerError: Raised by `work`.
        """
        if not self._processes.is_main:
            if fault := self._read(key):
                raise PeerLostError(f"process 0 failed, so this one ends: {fault}")
            return
        fault = "it was interrupted"
        try:
            work()
            fault = ""
        except Exception as error:
            fault = brief(error)
            raise
        finally:
            if self._processes.world_size > 1:
                self._post(key, fault)

    def _worker(self, name: str) -> int:
        """The rank that does the work for this process."""
        node, leader = self._processes.node, self._processes.node_leader
        if node == 0:
            return 0
        if self._processes.rank == leader:
            self._post(f"sees/{node}", str(int(_appears(self._folder / name))))
        return 0 if self._read(f"sees/{node}") == "1" else leader

    @contextlib.contextmanager
    def _visible_file(self) -> Iterator[str]:
        """A file that the main process writes, so that others see whether they share the folder."""
        if not self._processes.is_main:
            yield self._read("file")
            return
        with _file_in(self._folder) as name:
            self._post("file", name)
            yield name

    def _describe(self) -> str:
        nodes = range(1, self._processes.nodes)
        apart = [node for node in nodes if self._read(f"sees/{node}") != "1"]
        if not nodes:
            return ""
        if not apart:
            return f"done once for all {len(nodes) + 1} nodes, which share {self._folder}"
        return (
            f"done on {len(apart) + 1} of {len(nodes) + 1} nodes separately: "
            f"{self._folder} is not shared with node {', '.join(map(str, apart))}"
        )

    def _wait_for(self, worker: int) -> None:
        if fault := self._read(f"done/{worker}"):
            raise PeerLostError(f"process {worker} failed, so this one ends: {fault}")

    def _post(self, key: str, value: str) -> None:
        with _store_errors():
            self._processes.store.set(f"once/{key}", value)

    def _read(self, key: str) -> str:
        """The value of a key, once it exists."""
        store: Any = self._processes.store
        with _store_errors():
            while not store.check([f"once/{key}"]):
                time.sleep(0.2)
            return str(store.get(f"once/{key}").decode())


def check_shared(processes: Processes, folder: Path) -> None:
    """Check that all machines see the folder in which the main process writes checkpoints. A
    collective call.

    Raises:
        LaunchError: Names the nodes that do not; raised on every process.
    """
    if processes.nodes == 1:
        return
    with _file_in(folder) if processes.is_main else contextlib.nullcontext("") as own:
        (name,) = processes.gather([own] if processes.is_main else [])
        leads = processes.rank == processes.node_leader
        apart = leads and not _appears(folder / name)
        nodes = processes.gather([str(processes.node)] if apart else [])
    if nodes:
        raise LaunchError(
            f"--work-dir {folder}: node {', '.join(nodes)} of {processes.nodes} does not see the "
            f"folder that node 0 writes to, so it cannot read checkpoints; give the same folder of "
            f"a file system that all nodes share on each"
        )


@contextlib.contextmanager
def _file_in(folder: Path) -> Iterator[str]:
    """The name of an empty file in `folder` that exists within the block, if it can be written."""
    name = f".shared-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        (folder / name).touch()
    try:
        yield name
    finally:
        with contextlib.suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def _appears(file: Path) -> bool:
    end = time.monotonic() + NOTICE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if file.name in os.listdir(
                file.parent
            ):  # asks the server, which reading the name does not
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
