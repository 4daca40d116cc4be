"""One-dimensional .npy files that are written piece by piece, and read where they are asked for.

They are not mapped: pages of a mapped file count as memory of the process that has looked at them,
so that a training run would seem to grow until the whole data set is in memory.
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

MOST_HELD = 512
"""Columns that are kept open; further ones are opened for every reading, since a process may open
only so many files."""

_CAN_READ_ANYWHERE = hasattr(os, "pread")  # Windows lacks it
_holding: weakref.WeakSet[Column] = weakref.WeakSet()


class ColumnWriter:
    """A .npy file that grows; the header has room for the final length."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._length = 0
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add `values` at the end."""
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
    """A .npy file of one dimension; processes and threads may read it at the same time.

    Args:
        path: the file.
        dtype: of what it must hold.

    Raises:
        ValueError: it is not there, damaged, or holds something else.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path, self._dtype = path, dtype
        self._lock = threading.Lock()
        self._held: BinaryIO | None = None
        with contextlib.ExitStack() as closing:
            try:
                file = closing.enter_context(_opened(path))
                self._length, self._start = _header(file, dtype)
                size = os.fstat(file.fileno()).st_size
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
            if size != self._start + self._length * dtype.itemsize:
                raise ValueError(f"{path}: does not hold its {self._length} values")
            if len(_holding) < MOST_HELD:
                self._held = file
                _holding.add(self)
                weakref.finalize(self, closing.pop_all().close)

    def __len__(self) -> int:
        return self._length

    def read(self, start: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """`count` values from `start` on, or all that follow; the array is read-only."""
        stop = self._length if count is None else min(start + count, self._length)
        first, end = (self._start + place * self._dtype.itemsize for place in (start, stop))
        if self._held is not None:
            raw = self._bytes(self._held, first, end)
        else:
            with _opened(self._path) as file:
                raw = self._bytes(file, first, end)
        return np.frombuffer(raw, self._dtype)

    def _bytes(self, file: BinaryIO, first: int, end: int) -> bytes:
        parts = []
        while first < end:  # one call reads no more than 2 GB
            if _CAN_READ_ANYWHERE:
                part = os.pread(file.fileno(), end - first, first)
            else:
                with self._lock:
                    file.seek(first)
                    part = file.read(end - first)
            if not part:
                raise OSError(errno.EIO, f"{self._path} ends too early")
            parts.append(part)
            first += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, path.open("rb", buffering=0))


def _header(file: BinaryIO, dtype: np.dtype[Any]) -> tuple[int, int]:
    """The length of an array, and where its values begin."""
    np.lib.format.read_magic(file)
    shape, _, found = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 1 or found != dtype:
        raise ValueError(f"holds {found} of shape {shape}, not {dtype} of one dimension")
    return int(shape[0]), file.tell()
