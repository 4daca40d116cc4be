"""Encode the sources of a run, each to one store of the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from xtuner.calls.check import CallPolicy
from xtuner.config.schema import Settings
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.sources.resolve import PreparedSource
from xtuner.data.sources.rows import Task
from xtuner.data.tokenize import cache
from xtuner.data.tokenize.progress import progress_bar
from xtuner.data.tokenize.row_encoder import Encoder
from xtuner.data.tokenize.store import EncodedChunk, RowStore, StoreWriter
from xtuner.data.tokenize.workers import chunked, encode_all
from xtuner.local_imports import sources
from xtuner.templates.base import Template
from xtuner.types import Algorithm

_MAX_PROCESSES = 8
_SMALL = 2_000_000
"""Sources of fewer bytes are encoded in this process, which is faster than starting others."""


class Encoding:
    """Encodes the sources of a run.

    Args:
        settings: `algorithm`, its options, `tool_call_errors`, `thoughts` and `dataset_num_proc`
            are used.
        template, tokenizer, algorithm, image_layout, vocab_size: See `Encoder`.
        folder: Where relative paths are looked up first.
        quiet: Show no progress.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        template: Template,
        tokenizer: Any,
        folder: Path,
        algorithm: Algorithm,
        image_layout: ImageLayout | None,
        vocab_size: int | None = None,
        quiet: bool = False,
    ) -> None:
        calls = CallPolicy(settings.tool_call_errors, settings.thoughts)
        self._encoder = Encoder((), template, tokenizer, algorithm, image_layout, vocab_size, calls)
        self._options, self._processes = settings.algorithm_options, settings.dataset_num_proc
        self._folder, self._quiet = folder, quiet

    def store(self, source: PreparedSource) -> RowStore:
        """The encoded rows of `source`, from the cache if possible."""

        def make(writer: StoreWriter) -> None:
            for chunk in self.chunks(source):
                writer.append(chunk)

        return cache.load_or_make(
            self._key(source),
            file_names=[file.name for file in source.files],
            units=[file.unit for file in source.files],
            make=make,
            usable=self._usable,
        )

    def _usable(self, store: RowStore) -> bool:
        """Whether a cached store is still valid: a missing image may exist now."""
        if (layout := self._encoder.image_layout) is None:
            return True
        try:
            return not any(layout.is_usable(name) for name in store.bad_files())
        except (OSError, ValueError):
            return False

    def chunks(self, source: PreparedSource) -> Iterator[EncodedChunk]:
        """Encode all rows of `source`, with a progress bar."""
        encoder = replace(self._encoder, formats=source.formats)
        read = rows = 0

        def tracked() -> Iterator[Task]:
            nonlocal read
            for task in source.tasks():
                read = task.row.end
                yield task

        encoded = encode_all(encoder, chunked(tracked()), processes=self._num_processes(source))
        bar = progress_bar(source.name, total=source.size, quiet=self._quiet)
        with bar as show, closing(encoded):
            for chunk in encoded:
                rows += len(chunk.lengths) + len(chunk.faults)
                show(read, rows)
                yield chunk

    def _num_processes(self, source: PreparedSource) -> int:
        if self._processes is not None:
            return self._processes
        affinity = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        return 1 if source.size < _SMALL else min(cores, _MAX_PROCESSES)

    def _key(self, source: PreparedSource) -> str:
        e = self._encoder
        names = [format.name for format in source.formats]
        renames = [sorted(format.renames.items()) for format in source.formats]
        return cache.key_of(
            {
                **(e.image_layout.facts() if e.image_layout else {}),
                **({"vocab_size": e.vocab_size} if e.vocab_size else {}),
                "template": e.template.fingerprint(),
                "tokenizer": cache.tokenizer_identity(e.tokenizer),
                "calls": astuple(e.calls),
                "algorithm": [_source_hash(e.algorithm), self._options],
                "files": [file.digest() for file in source.files],
                "formats": names,
                **({"columns": renames} if any(renames) else {}),
                **({"delimiters": marks} if any(marks := [f.note for f in source.files]) else {}),
                "rules": [cache.rules_of(name, folder=self._folder) for name in sorted({*names})],
            }
        )


def _source_hash(algorithm: Algorithm) -> str:
    """A hash of the source files that define how `algorithm` encodes a row."""
    digest = hashlib.sha256()
    for kind in type(algorithm).__mro__:
        if function := vars(kind).get("encode"):
            digest.update(f"{kind.__name__}\n".encode())
            file = Path(function.__code__.co_filename)
            package = file.is_relative_to(Path(__file__).parents[2])
            for path in [file] if package else sources(file):
                digest.update(path.read_bytes())
    return digest.hexdigest()
