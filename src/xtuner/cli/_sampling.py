"""Options that control how answers are sampled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from xtuner.generation.generate import GenerationOptions

Temperature: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="Sampling temperature; lower is more deterministic. Without it, decoding is greedy."
    ),
]
TopK: TypeAlias = Annotated[
    int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens.")
]
TopP: TypeAlias = Annotated[
    float | None,
    typer.Option(metavar="P", help="Sample from the most likely tokens with total probability P."),
]
RepetitionPenalty: TypeAlias = Annotated[
    float | None, typer.Option(help="Values above 1 reduce repetition.")
]
Seed: TypeAlias = Annotated[int | None, typer.Option(help="Seed for sampling.")]
StopWords: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Also end answers at this string; repeatable."),
]


def note_without_effect(options: GenerationOptions) -> None:
    """Name the options that have no effect with greedy decoding."""
    if idle := options.without_effect:
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        verb = "has" if len(idle) == 1 else "have"
        typer.echo(f"Note: {flags} {verb} no effect without --temperature.", err=True)
