"""Check all rows and list every bad one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.data.build import length_limit
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.packing.overlong import fit, policy_of
from xtuner.data.report.account import EncodedSource, overlong_fault
from xtuner.data.sources.resolve import PreparedSource, prepare
from xtuner.data.tokenize.encode import Encoding
from xtuner.data.tokenize.faults import BadRow
from xtuner.data.tokenize.store import RowStore
from xtuner.errors import DataError
from xtuner.types import Algorithm


def bad_rows(
    settings: Settings,
    *,
    algorithm: Algorithm,
    folder: Path,
    image_layout: ImageLayout | None,
    unusable: list[str],
    **parts: Any,
) -> Iterator[str]:
    """Yield a line for each row that cannot be used: location, field and problem.

    The arguments are those of `build`. Encoded sources are read from the cache and added to it. The
    problem of a source or file that cannot be read is added to `unusable`, and the others are
    checked.

    Raises:
        ConfigError: Unknown format.
    """
    encoding = Encoding(
        settings, algorithm=algorithm, folder=folder, image_layout=image_layout, **parts
    )
    policy, limit = policy_of(settings, algorithm), length_limit(settings, image_layout)
    for number, source in enumerate(prepare(settings, folder=folder, unusable=unusable)):
        for part, store in _stores(encoding, source, unusable):
            if store.faults:
                for chunk in encoding.chunks(part):
                    yield from _lines(part, chunk.faults)
            fitted = fit(store, source=number, max_length=limit.tokens, policy=policy)
            encoded = EncodedSource(part, store, fitted, limit, policy)
            for row_number in fitted.lost.tolist():
                yield f"{encoded.location(row_number)}  {overlong_fault(policy, limit)}"


def kept_rows(settings: Settings, *, folder: Path, **parts: Any) -> Iterator[str]:
    """Yield a line for each row that is used although its tool calls are wrong: location, field and
    problem. The arguments are those of `build`."""
    encoding = Encoding(settings, folder=folder, **parts)
    for source in prepare(settings, folder=folder, unusable=[]):
        for part, store in _stores(encoding, source, []):
            if store.kept:
                for chunk in encoding.chunks(part):
                    yield from _lines(part, chunk.kept)


def _lines(source: PreparedSource, rows: Sequence[BadRow]) -> Iterator[str]:
    for row in rows:
        fault = " ".join(str(row.fault).split())
        yield f"{source.location(row.file, row.line)}  {fault}"


def _stores(
    encoding: Encoding, source: PreparedSource, unusable: list[str]
) -> Iterator[tuple[PreparedSource, RowStore]]:
    """Yield `source` with its encoded rows, or each of its files with its own if one of them cannot
    be read to its end; its problem is added to `unusable`."""
    try:
        yield source, encoding.store(source)
    except DataError as error:
        if len(source.files) == 1:
            unusable.append(str(error))
            return
        for file, format in zip(source.files, source.formats, strict=True):
            yield from _stores(
                encoding, replace(source, files=(file,), formats=(format,)), unusable
            )
