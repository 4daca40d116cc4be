"""Python tools in a separate process, which is ended if a call takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from xtuner.errors import ConfigError
from xtuner.tools.provider import Result

START_SECONDS = 60.0
"""Time limit for importing the tools."""


class LocalTools:
    """The tools `names` in a worker process, which keeps their state until a call times out.

    Raises:
        ConfigError: A tool cannot be loaded.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._calling = threading.Lock()
        self.schemas: Sequence[Mapping[str, Any]] = self._start()

    def call(self, name: str, arguments: Mapping[str, Any], *, timeout: float) -> Result:
        """See `Provider.call`; one call at a time, others wait."""
        with self._calling:
            return self._call(name, arguments, timeout)

    def _call(self, name: str, arguments: Mapping[str, Any], timeout: float) -> Result:
        try:
            if self._process is None:
                self._start()
            process = self._process
            assert process is not None and process.stdin is not None
            process.stdin.write(json.dumps({"name": name, "arguments": arguments}) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            self._end()
            return Result(f"Error: the call took more than {timeout:g} s", failed=True)
        except (OSError, ConfigError) as error:
            self._end()
            return Result(f"Error: the tools do not run: {error}", failed=True)
        except BaseException:
            self._end()  # the answer of a stopped call must not be taken for that of the next one
            raise
        if line is None:
            self._end()
            return Result("Error: the tool ended its process", failed=True)
        found = json.loads(line)
        return Result(str(found["text"]), bool(found["failed"]))

    def close(self) -> None:
        """See `Provider.close`."""
        self._end()

    def _start(self) -> Sequence[Mapping[str, Any]]:
        source = str(Path(__file__).parents[2])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "xtuner.tools.worker", *self._names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        assert process.stdout is not None
        self._lines = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, self._lines), daemon=True)
        reader.start()
        try:
            line = self._lines.get(timeout=START_SECONDS)
        except queue.Empty:
            line = None
        if line is None:
            self._end()
            raise ConfigError("--tools: the process of the tools did not start")
        found = json.loads(line)
        if "error" in found:
            self._end()
            raise ConfigError(f"--tools: {found['error']}")
        tools: Sequence[Mapping[str, Any]] = found["tools"]
        return tools

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _read(pipe: IO[str], lines: queue.Queue[str | None]) -> None:
    """Forward the lines of the worker; None at its end."""
    with contextlib.suppress(ValueError, OSError):
        for line in pipe:
            lines.put(line)
    lines.put(None)
