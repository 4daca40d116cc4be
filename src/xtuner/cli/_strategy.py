"""The options of `xtuner train` that select a strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

_NAMES = (
    "deepspeed_zero1, deepspeed_zero2, deepspeed_zero2_offload, deepspeed_zero3, "
    "deepspeed_zero3_offload"
)

Strategy: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="How processes share the model: replicated, fsdp2, deepspeed_zero1, ... Same as --set "
        "strategy=...",
    ),
]
Deepspeed: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"{_NAMES}, or a DeepSpeed configuration FILE.json."),
]


def chosen(strategy: str | None, deepspeed: str | None) -> str | None:
    """The setting `strategy` that the options ask for.

    Raises:
        typer.BadParameter: Both are given, or `deepspeed` is not one of the names.
    """
    if strategy and deepspeed:
        raise typer.BadParameter("--strategy and --deepspeed cannot be combined")
    if deepspeed and not deepspeed.startswith("deepspeed_") and not deepspeed.endswith(".json"):
        raise typer.BadParameter(f"--deepspeed {deepspeed}: must be {_NAMES}, or FILE.json")
    if deepspeed and deepspeed.endswith(".json"):
        return str(Path(deepspeed).expanduser().absolute())
    return deepspeed or strategy
