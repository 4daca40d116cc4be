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
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from xtuner import plugins
from xtuner.calls.check import CallPolicy, Problem
from xtuner.data.formats.base import Format, RowError
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.sources.rows import Fault, Task, parse
from xtuner.data.tokenize.faults import BadRow
from xtuner.data.tokenize.parts import PART
from xtuner.data.tokenize.store import EncodedChunk, packed_images
from xtuner.errors import ConfigError, DataError, XTunerError
from xtuner.templates.base import Template
from xtuner.types import Algorithm, Conversation, Encoded, ImageRef, Preference, Record, Row, Text

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 20
PIECE = 200_000
"""Maximum characters per tokenizer call, which needs about 200 bytes for each."""

_NO_IMAGES = "are present, but the model does not take images; set visual_encoder_name_or_path"
_PR_SET_PDEATHSIG = 1


class EncodedRow(NamedTuple):
    """An encoded row: its sequences, the images of each, and what is wrong with its calls if it is
    used all the same."""

    parts: list[Encoded]
    images: tuple[tuple[ImageRef, ...], ...]
    kept: Fault | None = None


@dataclass(frozen=True)
class Encoder:
    """Encodes the rows of a source.

    Attributes:
        formats: the format of each file of the source.
        template: renders conversations.
        tokenizer: encodes plain text.
        algorithm: defines the accepted records and their sequences.
        image_layout: how images are expanded to tokens; None for a model without a vision tower.
        vocab_size: rows with token ids from here on cannot be used; None if there are none.
        calls: what happens to wrong tool calls and to thoughts.
    """

    formats: Sequence[Format]
    template: Template
    tokenizer: Any
    algorithm: Algorithm
    image_layout: ImageLayout | None = None
    vocab_size: int | None = None
    calls: CallPolicy = field(default_factory=CallPolicy)

    def record(self, task: Task) -> Record | Fault:
        """Parse and convert one row, and check its tool calls."""
        record = self._read(task)
        if isinstance(record, Fault):
            return record
        checked = self.calls.applied(record)
        return _fault(checked) if isinstance(checked, Problem) else checked

    def _read(self, task: Task) -> Record | Fault:
        raw = task.row.value
        row = parse(raw) if isinstance(raw, bytes) else raw
        return row if isinstance(row, Fault) else self._converted(row, self.formats[task.file])

    def encode(self, task: Task) -> list[Encoded] | Fault:
        """Encode one row; faults are returned, not raised."""
        row = self.encode_row(task)
        return row if isinstance(row, Fault) else row.parts

    def encode_row(self, task: Task) -> EncodedRow | Fault:
        """Encode one row and check its images."""
        record = self.record(task)
        if isinstance(record, Fault):
            return record
        problem = self.calls.problem(record) if self.calls.errors == "keep" else None
        kept = None if problem is None else _fault(problem)
        images = _images_of(record)
        if images and self.image_layout is None:
            return Fault(_NO_IMAGES, "images")
        if images and isinstance(record, Preference):
            return Fault("a preference with images cannot be trained on yet", "images")
        parts = self._encode(record)
        if isinstance(parts, Fault):
            return parts
        if self.image_layout is None or isinstance(record, Preference):
            return EncodedRow(parts, ((),) * len(parts), kept)
        expanded = self._expanded(parts, images, self.image_layout)
        return expanded if isinstance(expanded, Fault) else expanded._replace(kept=kept)

    def _expanded(
        self, parts: Sequence[Encoded], images: Sequence[str], layout: ImageLayout
    ) -> EncodedRow | Fault:
        """The row with its image tokens repeated. Each sequence of a conversation shows the first
        of its images; the first sequence shows most."""
        found: list[tuple[Encoded, tuple[ImageRef, ...]]] = []
        for part in parts:
            shown = images[: part.input_ids.count(layout.token_id)] if found else images
            expanded = layout.expanded(part, shown)
            if isinstance(expanded, Fault):
                return expanded
            found.append(expanded)
        return EncodedRow([part for part, _ in found], tuple(refs for _, refs in found))

    def _encode(self, record: Record) -> list[Encoded] | Fault:
        algorithm = self.algorithm
        if not isinstance(record, algorithm.records):
            expected = " or ".join(kind.__name__ for kind in algorithm.records)
            return Fault(
                f"is read as {type(record).__name__}, but this algorithm requires {expected}; set "
                "another dataset_format or algorithm"
            )
        try:
            parts = list(algorithm.encode(record, self))
        except Exception as error:  # templates are third-party code; one row must not stop the run
            return Fault(_one_line(error))
        if wrong := next((part for part in parts if not isinstance(part, Encoded)), None):
            raise ConfigError(
                f"{type(algorithm).__name__}.encode made a {type(wrong).__name__}; every sequence "
                "must be an Encoded of xtuner.types, as encoder.conversation and encoder.text give"
            )
        if not parts or len(parts) != algorithm.sequences_per_row != 1:
            raise ConfigError(
                f"{type(algorithm).__name__}.encode returned {len(parts)} sequences for a row, "
                f"but its sequences_per_row is {algorithm.sequences_per_row}"
            )
        if any(part.weights is not None for part in parts):
            self._check_weights(parts)
        if self.vocab_size is not None and (fault := self._without_embedding(parts)):
            return fault
        if not all(any(part.loss_mask[1:]) for part in parts):
            return Fault("has no supervised tokens, so it has no effect on training")
        return parts

    def _check_weights(self, parts: Sequence[Encoded]) -> None:
        name = type(self.algorithm).__name__
        if not _takes_weights(self.algorithm):
            raise ConfigError(
                f"the data have loss weights, but {name}.loss does not declare that it uses them: "
                "multiply by batch.weights_of_predicting, divide by batch.sum_of_weights, and set "
                f"takes_weights = True in {name}; or remove the weights from the data"
            )
        for part in parts:
            if part.weights is not None and len(part.weights) != len(part.input_ids):
                raise ConfigError(
                    f"{name}.encode returned {len(part.weights)} weights for "
                    f"{len(part.input_ids)} tokens"
                )

    def _without_embedding(self, parts: Sequence[Encoded]) -> Fault | None:
        """The fault of a row whose token ids exceed the model's embedding."""
        for part in parts:
            for token in part.input_ids:
                image = self.image_layout and token == self.image_layout.token_id
                if self.vocab_size is not None and token >= self.vocab_size and not image:
                    name = self.tokenizer.convert_ids_to_tokens(token)
                    return Fault(
                        "has a token for which the model has no embedding; set resize_embeddings = "
                        "True, remove it, or give the tokenizer that belongs to the model",
                        detail=f"{name!r}, id {token}",
                    )
        return None

    def _converted(self, row: Row, format: Format) -> Record | Fault:
        try:
            return format.convert(row)
        except RowError as error:
            hint = f"; {error.hint}" if error.hint else ""
            return Fault(error.problem + hint, error.field)
        except Exception as error:  # a format may be the user's own code
            return Fault(f"format {format.name!r} raised {_one_line(error)}")

    def conversation(self, record: Conversation) -> Encoded:
        """Encode a conversation to one sequence; assistant turns are supervised."""
        return self.template.encode(record)

    def sequences(self, record: Conversation) -> Sequence[Encoded]:
        """Encode a conversation to the sequences that together supervise each assistant turn."""
        return self.template.sequences(record)

    def text(self, record: Text) -> Encoded:
        """Encode text with the tokenizer's BOS and EOS; all but the first token are supervised."""
        ids: list[int] = []
        for piece in _pieces(record.text):
            ids += self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if ids[:1] != self._first:
            ids[:0] = self._first
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return Encoded(ids, [False] + [True] * (len(ids) - 1))

    @cached_property
    def _first(self) -> list[int]:
        """The BOS token, if the tokenizer adds one by default."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []


def _fault(problem: Problem) -> Fault:
    return Fault(f"{problem.problem}; {problem.hint}", problem.where)


def _images_of(record: Record) -> tuple[str, ...]:
    match record:
        case Conversation():
            return record.images
        case Preference():
            return (*record.chosen.images, *record.rejected.images)
    return ()


def _takes_weights(algorithm: Algorithm) -> bool:
    """Whether the class that defines `algorithm.loss`, or one derived from it, says so."""
    for kind in type(algorithm).__mro__:
        if "takes_weights" in vars(kind):
            return bool(vars(kind)["takes_weights"])
        if "loss" in vars(kind):
            return False
    return False


def _pieces(text: str) -> Iterator[str]:
    """Split a very long text after line ends, otherwise before spaces."""
    start = 0
    while len(text) - start > PIECE:
        stop = text.rfind("\n", start + 1, start + PIECE) + 1
        stop = stop or text.rfind(" ", start + 1, start + PIECE)
        stop = stop if stop > start else start + PIECE
        yield text[start:stop]
        start = stop
    yield text[start:]


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    known = isinstance(error, ValueError | XTunerError) and not plugins.user_location(error)
    return message if known and message else plugins.described(error)


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
        encoded = encoder.encode_row(task)
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
        DataError: a process was killed, for example because memory ran out.
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
