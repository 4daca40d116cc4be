"""`xtuner report`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Language(StrEnum):
    """Languages of the report."""

    en = "en"
    zh = "zh"


def command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The work dir of a run.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Output file. Default: RUN/report.html.")
    ] = None,
    language: Annotated[Language, typer.Option(help="Language of the report.")] = Language.en,
) -> None:
    """Write the report of a run.

    One HTML file with curves, sample answers, data and settings. A run writes it when it ends; this
    command also works during the run.
    """
    from xtuner.runs import report

    typer.echo(str(report.write(run, language=language.value, out=out)))
