"""Run one command in several processes of this machine that train together.

Unlike torchrun this keeps the exit code of the main process, shows its output alone, and waits for
a save to finish after Ctrl-C. It restarts nothing: an exact resume is one flag away.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO

GRACE_SECONDS = 15.0
"""How long the others may go on after one process failed: the main one has a message to print."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` in `processes` processes and return the exit code of the run.

    It is the main process's unless that is 0 or a signal of ours; then the first failed one's,
    whose messages are shown.
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    children: list[subprocess.Popen[bytes]] = []
    logs: list[IO[bytes]] = []

    def forward(number: int, frame: object) -> None:
        for child in children:
            child.send_signal(number)

    before = {
        # Ctrl-C reaches the children by itself; here it only must not end the wait for them.
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, forward),
    }
    try:
        for rank in range(processes):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the run is over)
            logs.append(log)
            output = None if rank == 0 else log
            children.append(
                subprocess.Popen(
                    command, env={**environment, **ranks}, stdout=output, stderr=output
                )
            )
        return _wait(children, logs)
    finally:
        for child in children:
            child.kill()
        for log in logs:
            log.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], logs: list[IO[bytes]]) -> int:
    failed: int | None = None
    deadline = float("inf")
    while any(child.poll() is None for child in children):
        if failed is None:
            failed = next((r for r, c in enumerate(children) if c.poll() not in (None, 0)), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline or (failed == 0):
            for child in children:
                child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    if codes[0] > 0 or not any(codes):
        return codes[0]
    rank = failed or next(r for r, code in enumerate(codes) if code)
    if rank:
        logs[rank].seek(0)
        text = logs[rank].read().decode(errors="replace")[-4000:]
        print(f"Process {rank} failed:\n{text}", file=sys.stderr)
    return codes[rank] if codes[rank] > 0 else 128 - codes[rank]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
