"""Go through all rows and name every bad one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.config.schema import Settings
from xtuner.data.build import room_of
from xtuner.data.images.expansion import ImageLayout
from xtuner.data.packing.overlong import fit, policy_of
from xtuner.data.report.account import Encoded, overlong_fault
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
    quiet: bool = False,
) -> Iterator[str]:
    """Yield a line for each row that cannot be used: where it is, the field, what is wrong.

    The arguments are those of `build`. Good sources come from the cache, and are in it afterwards.

    Raises:
        DataError: a source cannot be read.
        ConfigError: there is no format of that name.
    """
    encoding = Encoding(
        settings,
        template=template,
        tokenizer=tokenizer,
        folder=folder,
        quiet=quiet,
        algorithm=algorithm,
        image_layout=image_layout,
    )
    for number, source in enumerate(prepare(settings, folder=folder)):
        store = encoding.store(source)
        if store.faults:
            for chunk in encoding.chunks(source):
                for row in chunk.faults:
                    yield f"{source.place(row.file, row.line)}  {' '.join(str(row.fault).split())}"
        policy, room = policy_of(settings, algorithm), room_of(settings, image_layout)
        fitted = fit(store, source=number, max_length=room.tokens, policy=policy)
        encoded = Encoded(source, store, fitted, room, policy)
        for row_number in fitted.lost.tolist():
            yield f"{encoded.place(row_number)}  {overlong_fault(policy, room)}"
