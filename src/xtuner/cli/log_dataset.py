"""`xtuner log-dataset`."""

from __future__ import annotations

import functools
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtuner.cli import _output, _settings
from xtuner.errors import count

if TYPE_CHECKING:
    from rich.console import Console

    from xtuner.data.images.expansion import ImageLayout
    from xtuner.data.packing.pack import PackedDataset


class Show(StrEnum):
    """What to show of each sample."""

    text = "text"
    masked_text = "masked_text"
    input_ids = "input_ids"
    labels = "labels"
    all = "all"


_KINDS = tuple(kind for kind in Show if kind is not Show.all)


def command(
    config: _settings.Config,
    show: Annotated[
        Show,
        typer.Option(
            help="Print the text, the text without unsupervised tokens, the token ids, the labels, "
            "or all of these."
        ),
    ] = Show.text,
    num: Annotated[int, typer.Option("-n", "--num", min=1, help="Number of packs to show.")] = 1,
    overrides: _settings.Overrides = None,
    trust_remote_code: _settings.TrustRemoteCode = False,
    trust_code: _settings.TrustCode = False,
) -> None:
    """Print the data as the model sees it.

    Supervised tokens are green in a terminal, and between « and » elsewhere.
    """
    from rich.console import Console
    from rich.rule import Rule

    parts = _settings.open_data(
        config, overrides=overrides, trust_remote_code=trust_remote_code, trust_code=trust_code
    )
    data = parts.build()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    for number in range(min(num, len(data.train))):
        _print_pack(console, data.train, number, show, parts.tokenizer, parts.image_layout)
    console.print(Rule(characters="═", style="none"))
    if show in (Show.text, Show.all):
        marked = "green" if console.is_terminal else "between « and »"
        console.print(f"The tokens that are trained on are {marked}.")
    for line in data.report.lines():
        _output.echo(line)


def _print_pack(
    console: Console,
    packs: PackedDataset,
    number: int,
    show: Show,
    tokenizer: Any,
    image_layout: ImageLayout | None,
) -> None:
    from rich.rule import Rule

    from xtuner.data.report.show_tokens import draw

    samples = packs[number]
    if image_layout:
        samples = list(map(image_layout.without_cut_image, samples))
    drawn = functools.partial(
        draw, tokenizer=tokenizer, marks=not console.is_terminal, image_layout=image_layout
    )
    tokens = sum(len(sample.input_ids) for sample in samples)
    title = f"pack {number + 1:,} of {len(packs):,}: {count(tokens, 'token')}"
    console.print(Rule(title, characters="═", style="none"))
    for index, sample in enumerate(samples, 1):
        supervised = int(sample.loss_mask[1:].sum())
        counts = f"{count(len(sample.input_ids), 'token')}, {supervised:,} supervised"
        title = f"sample {index} of {len(samples)} · {sample.row} · {counts}"
        console.print(Rule(title, align="left", style="none"))
        for what in _KINDS if show is Show.all else [show]:
            if show is Show.all:
                console.print(f"{what.value}:")
            console.print(drawn(sample, what.value))
