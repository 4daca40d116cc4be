"""Check all rows and list every bad one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.data.build import length_limit
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.packing.overlong import fit, policy_of
from xtuner.data.report.account import EncodedSource, overlong_fault
from xtuner.data.sources.resolve import prepare
from xtuner.data.tokenize.encode import Encoding
from xtuner.templates.base import Template
from xtuner.types import Algorithm


def bad_rows(
    settings: Settings,
    *,
    template: Template,
    tokenizer: Any,
    folder: Path,
    algorithm: Algorithm,
    image_layout: ImageLayout | None,
    vocab_size: int | None = None,
    quiet: bool = False,
) -> Iterator[str]:
    """Yield a line for each row that cannot be used: location, field and problem.

    The arguments are those of `build`. Encoded sources are read from the cache and added to it.

    Raises:
        DataError: a source cannot be read.
        ConfigError: unknown format.
    """
    encoding = Encoding(
        settings,
        template=template,
        tokenizer=tokenizer,
        folder=folder,
        quiet=quiet,
        algorithm=algorithm,
        image_layout=image_layout,
        vocab_size=vocab_size,
    )
    for number, source in enumerate(prepare(settings, folder=folder)):
        store = encoding.store(source)
        if store.faults:
            for chunk in encoding.chunks(source):
                for row in chunk.faults:
                    fault = " ".join(str(row.fault).split())
                    yield f"{source.location(row.file, row.line)}  {fault}"
        policy, limit = policy_of(settings, algorithm), length_limit(settings, image_layout)
        fitted = fit(store, source=number, max_length=limit.tokens, policy=policy)
        encoded = EncodedSource(source, store, fitted, limit, policy)
        for row_number in fitted.lost.tolist():
            yield f"{encoded.location(row_number)}  {overlong_fault(policy, limit)}"
