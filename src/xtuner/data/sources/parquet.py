"""Read the rows of a parquet or arrow file, in a child process.

A malformed file can end the process that reads it (pyarrow aborts). Processes are reused for the
next file, since each takes a third of a second to start, and end with this one.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from xtuner.data.sources.rows import Fault, without_nulls
from xtuner.errors import DataError
from xtuner.types import Row

_SCRIPT = Path(__file__).with_name("parquet_child.py")
_ALLOWED = {
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    ("decimal", "Decimal"),
    ("builtins", "str"),
}


def parquet_rows(path: Path, *, name: str) -> Iterator[tuple[Row | Fault, float]]:
    """Yield each row, or why it cannot be read, and the share of the file read.

    Raises:
        DataError: The file is incomplete, or ends the process that reads it.
    """
    child = _Child.get()
    try:
        child.ask({"open": str(path.absolute())})
        while answer := child.answer(name):
            child.ask({})  # the next rows are read while these are used
            for row in answer["rows"]:
                fault = isinstance(row, tuple)
                yield (
                    Fault(row[1], row[0], row[2]) if fault else without_nulls(row),
                    answer["share"],
                )
    finally:
        child.release()


class _Child:
    """A process that reads parquet files for this one."""

    _idle: ClassVar[list[_Child]] = []

    def __init__(self) -> None:
        self._owner, self._waiting = os.getpid(), 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    @classmethod
    def get(cls) -> _Child:
        """An idle process, or a new one."""
        while cls._idle:
            child = cls._idle.pop()
            if child._owner == os.getpid() and child._process.poll() is None:
                return child
        return cls()

    def release(self) -> None:
        """Keep the process for the next file; end it if an answer is pending."""
        if self._waiting or self._process.poll() is not None:
            self.end()
        else:
            self._idle.append(self)

    def end(self) -> None:
        """End the process."""
        if self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()

    def ask(self, request: dict[str, Any]) -> None:
        """Send a request; `answer` reports a process that has ended."""
        assert self._process.stdin
        self._waiting += 1
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return

    def answer(self, name: str) -> dict[str, Any] | None:
        """The answer to the oldest request; None at the end of the file.

        Raises:
            DataError: The file `name` cannot be read.
        """
        assert self._process.stdout
        size = int.from_bytes(self._process.stdout.read(8), "little")
        content = self._process.stdout.read(size)
        if not content or len(content) < size:
            code = self._process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise DataError(
                f"{name}: is malformed: the process that read it ended ({how}); write it again"
            )
        self._waiting -= 1
        found: dict[str, Any] = _Unpickler(io.BytesIO(content)).load()
        if "refused" in found:
            raise DataError(f"{name}: {found['refused']}")
        if "error" in found:
            kind = Path(name).suffix.removeprefix(".")
            raise DataError(f"{name}: is not a complete {kind} file: {found['error']}")
        return found if found["rows"] else None


class _Unpickler(pickle.Unpickler):
    """Unpickles plain values, dates and decimal numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise DataError(f"a parquet file gave a value of the unknown type {module}.{name}")
        return super().find_class(module, name)


@atexit.register
def _end_all() -> None:
    while _Child._idle:
        _Child._idle.pop().end()
