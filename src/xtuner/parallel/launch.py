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

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

GRACE_SECONDS = 15.0
"""How long the others may go on after one process failed: the main one has a message to print."""


def launch(command: Sequence[str], processes: int) -> int:
    """Run `command` in `processes` processes and return the exit code of the run.

    It is the main process's unless that is 0 or a signal of ours; then the first failed one's. What
    another than the main process said is shown where it failed first.
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

    before = {number: signal.signal(number, forward) for number in stop_signals()}
    # Ctrl-C reaches the children by itself; here it only must not end the wait for them.
    if signal.SIGINT in before:
        signal.signal(signal.SIGINT, lambda number, frame: None)
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


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a run to stop: Ctrl-C, and what schedulers (Slurm) and terminals send.

    One that is ignored stays ignored, as nohup means SIGHUP to be.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    known = [signal.Signals[name] for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


def _wait(children: list[subprocess.Popen[bytes]], logs: list[IO[bytes]]) -> int:
    failed: list[int] = []
    deadline = float("inf")
    while any(child.poll() is None for child in children):
        if not failed:
            failed = [r for r, c in enumerate(children) if c.poll() not in (None, 0)]
            if failed:
                deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline or 0 in failed:
            for child in children:
                child.kill()
        time.sleep(0.05)
    codes = [child.returncode for child in children]
    failed = failed or [r for r, code in enumerate(codes) if code]
    for rank in failed:  # who failed first knows why, whatever the others say then
        if rank and codes[rank] != INTERRUPTED:
            _show(rank, logs[rank])
    if codes[0] > 0 or not failed:
        return codes[0]
    code = codes[failed[0]]
    return code if code > 0 else 128 - code


def _show(rank: int, log: IO[bytes]) -> None:
    log.seek(0)
    text = log.read().decode(errors="replace")[-4000:]
    print(f"Process {rank} failed:\n{text}", file=sys.stderr)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
