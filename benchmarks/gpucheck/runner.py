"""Runs parts one after another in a worker process, within a time budget.

The worker is a separate process because a crashed kernel ends its process and a hanging one can
only be killed. It runs many parts, because importing torch and initializing CUDA takes ten seconds.
After a crash, a timeout or a CUDA error, which makes the process unusable, the next part gets a new
worker.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpucheck.plan import Part

START_SECONDS = 90.0
"""A worker that is not ready after this time is abandoned."""

STICKY = ("CUDA error", "device-side assert", "illegal memory access", "CUBLAS_STATUS", "CUDNN_")


@dataclass
class Outcome:
    """The outcome of one part.

    Attributes:
        part: The part.
        state: 'done', 'failed' (an exception, a crash, too slow), 'skipped' (it cannot be done on
            this machine) or 'not reached' (there was no time left).
        rows: All its rows, including those before a failure.
        reason: Why it failed or was skipped.
        seconds: The time it took.
    """

    part: Part
    state: str = "done"
    rows: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether all required results were correct; parts of kind 'speed' require none."""
        wrong = any(row["passed"] is False for row in self.rows)
        missing = self.state in ("failed", "not reached") and self.part.kind != "speed"
        return not wrong and not missing


class Worker:
    """A process that runs parts by name."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def messages(self, until: float) -> Iterator[dict[str, Any]]:
        """Yield the worker's messages up to 'end'.

        Raises:
            TimeoutError: `time.monotonic()` reached `until`.
            EOFError: The process has ended.
        """
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError from None
            if line is None:
                raise EOFError(f"the process ended with code {self._process.wait()}")
            message = json.loads(line)
            yield message
            if "end" in message:
                return

    def ask(self, name: str) -> None:
        """Tell the worker to run the part `name`."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `messages` will report that it has ended
            self._process.stdin.write(name + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process and all its child processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # a name that was no longer read
                if pipe is not None:
                    pipe.close()

    def last_words(self, since: int) -> str:
        """The end of its stderr output after byte `since` of the log."""
        with self._log.open("rb") as file:
            file.seek(since)
            lines = file.read().decode(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:])[-400:]


class Runner:
    """Runs parts while there is time.

    Args:
        command: Command of a worker.
        environment: Environment of a worker.
        log: Receives the workers' stderr.
        seconds: Total time budget.
        tell: Called with each line of progress.
        slow: Factor for the parts' time limits, for a fake device.
    """

    def __init__(
        self,
        command: list[str],
        *,
        environment: dict[str, str],
        log: Path,
        seconds: float,
        tell: Callable[[str], None],
        slow: float = 1.0,
    ):
        self._command, self._environment, self._log = command, environment, log
        self._started = time.monotonic()
        self._end = self._started + seconds
        self._tell, self._slow = tell, slow
        self._worker: Worker | None = None
        self._failed_starts = 0

    def run(self, parts: Iterable[Part]) -> Iterator[Outcome]:
        """Yield the outcome of each part as soon as it is known."""
        try:
            for part in parts:
                outcome = self._one(part)
                self._tell(
                    f"[{time.monotonic() - self._started:4.0f} s] {part.name}: {outcome.state}"
                    f"{', not all passed' if not outcome.passed else ''}"
                    f"{f' ({outcome.reason})' if outcome.reason else ''}"
                )
                yield outcome
        finally:
            self._drop()

    def _one(self, part: Part) -> Outcome:
        left = self._end - time.monotonic()
        if self._failed_starts == 2:
            return Outcome(part, "failed", reason="no worker process starts; see above")
        if left < part.seconds:
            reason = f"needs about {part.seconds:.0f} s, and {max(0, left):.0f} s are left"
            return Outcome(part, "not reached", reason=reason)
        outcome = Outcome(part)
        begun = time.monotonic()
        mark = self._log.stat().st_size if self._log.exists() else 0
        try:
            worker = self._ready()
            limit = min(self._slow * part.limit, self._end - time.monotonic())
            begun = time.monotonic()
            worker.ask(part.name)
            for message in worker.messages(begun + limit):
                self._take(outcome, message)
        except TimeoutError:
            outcome.state, outcome.reason = (
                "failed",
                f"stopped after {time.monotonic() - begun:.0f} s",
            )
        except EOFError as error:
            words = self._worker.last_words(mark) if self._worker else ""
            outcome.state, outcome.reason = "failed", f"{error}: {words}"
        outcome.seconds = round(time.monotonic() - begun, 1)
        if outcome.state == "failed" and self._useless(outcome.reason):
            self._drop()
        return outcome

    @staticmethod
    def _take(outcome: Outcome, message: dict[str, Any]) -> None:
        if "row" in message:
            outcome.rows.append(message["row"])
        elif "skipped" in message:
            outcome.state, outcome.reason = "skipped", message["skipped"]
        elif "error" in message:
            outcome.state, outcome.reason = "failed", message["error"]

    @staticmethod
    def _useless(reason: str) -> bool:
        return reason.startswith(("stopped after", "the process ended")) or any(
            word in reason for word in STICKY
        )

    def _ready(self) -> Worker:
        """The worker, started if there is none."""
        if self._worker is None:
            self._failed_starts += 1
            self._worker = Worker(self._command, self._environment, self._log)
            until = min(self._end, time.monotonic() + START_SECONDS)
            for _ in self._worker.messages(until):
                self._failed_starts = 0
        return self._worker

    def _drop(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def worker_environment(root: Path) -> dict[str, str]:
    """The worker's environment: offline, with this checkout's sources and the memory settings of
    `xtuner train`."""
    paths = [str(root / "src"), str(root / "benchmarks")]
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        found["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    return found


def worker_command(script: Path, arguments: list[str]) -> list[str]:
    """The command that starts a worker."""
    return [sys.executable, str(script), "--worker", *arguments]
