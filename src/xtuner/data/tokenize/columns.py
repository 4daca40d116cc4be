"""One-dimensional .npy files that are written incrementally and read on access.

They are not memory-mapped: pages of a mapped file count as memory of the process that read them, so
a training run would appear to grow until the entire data set is in memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import weakref
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

MAX_OPEN = 512
"""Maximum columns kept open, since a process has a limit on open files; others are opened for each
read."""

_HAS_PREAD = hasattr(os, "pread")  # not on Windows
_open_columns: weakref.WeakSet[Column] = weakref.WeakSet()


class ColumnWriter:
    """A growing .npy file; the header has space for the final length."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Append `values`."""
        self._file.write(np.ascontiguousarray(values, dtype=self._dtype).tobytes())
        self._length += len(values)

    def close(self) -> int:
        """Write the final header; return the length."""
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()
        return self._length

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


class Column:
    """A one-dimensional .npy file; processes and threads may read it concurrently.

    Args:
        dtype: The expected dtype.

    Raises:
        ValueError: The file is missing, damaged, or has another dtype or shape.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        with contextlib.ExitStack() as closing:
            try:
                file = closing.enter_context(_opened(path))
                self._length, self._start = _header(file, dtype)
                size = os.fstat(file.fileno()).st_size
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
            if size != self._start + self._length * dtype.itemsize:
                raise ValueError(f"{path}: does not contain {self._length} values")
            if len(_open_columns) < MAX_OPEN:
                self._file = file
                _open_columns.add(self)
                weakref.finalize(self, closing.pop_all().close)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Read `count` values from `start`, by default all; the array is read-only."""
        stop = self._length if count is None else min(start + count, self._length)
        first, end = (self._start + index * self._dtype.itemsize for index in (start, stop))
        if self._file is not None:
            raw = self._bytes(self._file, first, end)
        else:
            with _opened(self._path) as file:
                raw = self._bytes(file, first, end)
        return np.frombuffer(raw, self._dtype)

    def _bytes(self, file: BinaryIO, first: int, end: int) -> bytes:
        parts = []
        while first < end:  # a single call reads at most 2 GB
            if _HAS_PREAD:
                part = os.pread(file.fileno(), end - first, first)
            else:
                with self._lock:
                    file.seek(first)
                    part = file.read(end - first)
            if not part:
                raise OSError(errno.EIO, f"{self._path} is truncated")
            parts.append(part)
            first += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, path.open("rb", buffering=0))


def _header(file: BinaryIO, dtype: np.dtype[Any]) -> tuple[int, int]:
    """The length of the array, and the offset of its values."""
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 1 or found != dtype:
        raise ValueError(f"expected a one-dimensional {dtype} array, found {found} {shape}")
    return int(shape[0]), file.tell()
