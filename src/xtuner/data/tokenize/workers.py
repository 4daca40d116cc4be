"""Encode rows to token ids and loss masks, in this process or in several.

The result does not depend on the number of processes: chunks of rows are distributed, and results
are collected in order. Processes are forked on Linux, so nothing needs pickling; they run only
Python and the tokenizer, never torch, and die with their parent. On other systems, rows are encoded
in this process.
"""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner.data.sources.rows import Fault, Task
from xtuner.data.tokenize.faults import BadRow
from xtuner.data.tokenize.parts import PART
from xtuner.data.tokenize.row_encoder import EncodedRow, Encoder
from xtuner.data.tokenize.store import EncodedChunk, packed_images
from xtuner.errors import DataError
from xtuner.types import Encoded, ImageRef

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 20

_PR_SET_PDEATHSIG = 1


class _Row(NamedTuple):
    """An encoded row: its concatenated sequences, and the images of each."""

    task: Task
    token_ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    lengths: list[int]
    images: tuple[tuple[ImageRef, ...], ...]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, task: Task, row: EncodedRow) -> _Row:
        ids = np.concatenate([np.array(part.input_ids, np.int32) for part in row.parts])
        mask = np.concatenate([np.array(part.loss_mask, np.bool_) for part in row.parts])
        lengths = [len(part.input_ids) for part in row.parts]
        return cls(task, ids, mask, lengths, row.images, _weights_of(row.parts))

    @property
    def supervised(self) -> list[int]:
        """Number of supervised tokens of each sequence; its first token never counts."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        return [int(self.mask[a + 1 : b].sum()) for a, b in zip(starts, ends, strict=True)]

    @property
    def image_names(self) -> npt.NDArray[np.uint8]:
        return packed_images([ref for refs in self.images for ref in refs])


def _weights_of(parts: Sequence[Encoded]) -> npt.NDArray[np.float32]:
    """The loss weight of each token of a row; empty if all are 1."""
    if all(part.weights is None for part in parts):
        return np.zeros(0, np.float32)
    each = [part.weights or [1.0] * len(part.input_ids) for part in parts]
    return np.concatenate([np.array(weights, np.float32) for weights in each])


def encode_chunk(encoder: Encoder, tasks: Sequence[Task]) -> EncodedChunk:
    """Encode some rows."""
    rows: list[_Row] = []
    faults: list[BadRow] = []
    kept: list[BadRow] = []
    for task in tasks:
        encoded = encoder.encode(task)
        if isinstance(encoded, Fault):
            faults.append(BadRow(task.file, task.row.line, encoded))
            continue
        rows.append(_Row.of(task, encoded))
        if encoded.kept is not None:
            kept.append(BadRow(task.file, task.row.line, encoded.kept))
    together = encoder.algorithm.sequences_per_row > 1
    names = [row.image_names for row in rows]
    return EncodedChunk(
        token_ids=np.concatenate([np.zeros(0, np.int32), *(row.token_ids for row in rows)]),
        mask=np.concatenate([np.zeros(0, np.bool_), *(row.mask for row in rows)]),
        lengths=np.array([len(row.token_ids) for row in rows], np.int64),
        sequence_lengths=np.array(
            [length for row in rows for length in row.lengths] if together else [], np.int32
        ),
        parts=np.array([] if together else _parts(rows), np.int32).reshape(-1, len(PART)),
        weights=np.concatenate([np.zeros(0, np.float32), *(row.weights for row in rows)]),
        weighted_rows=np.array([i for i, row in enumerate(rows) if len(row.weights)], np.int32),
        lines=np.array([row.task.row.line for row in rows], np.int32),
        files=np.array([row.task.file for row in rows], np.int32),
        supervised=np.array([sum(row.supervised) for row in rows], np.int32),
        hashes=np.array([_hash(r, n) for r, n in zip(rows, names, strict=True)], np.uint64),
        image_names=np.concatenate([np.zeros(0, np.uint8), *names]),
        image_lengths=np.array([len(name) for name in names], np.int64),
        faults=faults,
        kept=kept,
    )


def _parts(rows: Sequence[_Row]) -> list[tuple[int, ...]]:
    """The samples of the rows that have several; see `store.PART`."""
    return [
        (number, length, supervised, len(refs))
        for number, row in enumerate(rows)
        if len(row.lengths) > 1
        for length, supervised, refs in zip(row.lengths, row.supervised, row.images, strict=True)
    ]


def encode_all(
    encoder: Encoder, chunks: Iterable[Sequence[Task]], *, processes: int
) -> Generator[EncodedChunk, None, None]:
    """Encode `chunks` in `processes` processes and yield the results in the order of the chunks.

    Raises:
        DataError: A process was killed, for example because memory ran out.
    """
    if processes == 1 or not _CAN_FORK:
        yield from (encode_chunk(encoder, chunk) for chunk in chunks)
        return
    with _serial_tokenizers():
        pool = ProcessPoolExecutor(
            processes,
            mp_context=multiprocessing.get_context("fork"),
            initializer=_start_worker,
            initargs=(encoder, os.getpid()),
        )
        pending: deque[Future[EncodedChunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_encode_in_worker, chunk))
                if len(pending) > 3 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process that encodes the data was killed, possibly because memory ran out; "
                "set dataset_num_proc to a smaller number"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def chunked(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Group tasks into chunks for the worker processes."""
    chunk: list[Task] = []
    size = 0
    for task in tasks:
        chunk.append(task)
        size += len(task.row.value) if isinstance(task.row.value, bytes) else 0
        if len(chunk) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_CAN_FORK = sys.platform == "linux"
_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder, parent: int) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C reaches all processes of the terminal; the parent stops its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before prctl was called
        os._exit(1)


def _encode_in_worker(chunk: Sequence[Task]) -> EncodedChunk:
    assert _worker_encoder is not None
    return encode_chunk(_worker_encoder, chunk)


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Disable threads in tokenizers, which do not survive a fork."""
    name = "TOKENIZERS_PARALLELISM"
    previous = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if previous is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = previous


def _hash(row: _Row, names: npt.NDArray[np.uint8]) -> int:
    digest = hashlib.blake2b(row.token_ids.tobytes(), digest_size=8)
    for array in (row.mask, names, row.weights):
        digest.update(array.tobytes())
    return int.from_bytes(digest.digest(), "little")
