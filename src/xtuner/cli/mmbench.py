"""`xtuner mmbench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _model


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A LLaVA model: a work dir or iter_N, a merged model, or with --llava its "
            "language model.",
        ),
    ],
    data_path: Annotated[Path, typer.Option(metavar="TSV", help="An MMBench file (TSV).")],
    visual_encoder: _model.VisualEncoder = None,
    llava: _model.Llava = None,
    prompt_template: _model.PromptTemplate = None,
    work_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("mmbench"),
    max_new_tokens: _model.MaxNewTokens = 100,
    bits: _model.Bits = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Ask only the first N questions.")
    ] = None,
    trust_remote_code: _model.TrustRemoteCode = False,
) -> None:
    """Measure a LLaVA model on MMBench.

    Writes mmbench_result.xlsx and mmbench_result.json, and prints the accuracy if the file has the
    answers (the test split has none: submit the xlsx).
    """
    from xtuner.chat import mmbench
    from xtuner.chat.opening import open_chat
    from xtuner.errors import ConfigError, count
    from xtuner.generation.generate import GenerationOptions

    questions = mmbench.read_tsv(data_path)[:limit]
    session = open_chat(
        model,
        prompt_template=prompt_template,
        visual_encoder=visual_encoder,
        llava=llava,
        bits=bits,
        options=GenerationOptions(max_new_tokens=max_new_tokens),
        trust_remote_code=trust_remote_code,
    )
    if session.vision is None:
        raise ConfigError(f"{model}: does not take images; give a LLaVA model")

    def progress(done: int) -> None:
        if done % 50 == 0 or done == len(questions):
            typer.echo(f"{done:,} of {count(len(questions), 'question')}", err=True)

    answered = list(mmbench.ask_all(session, questions, progress=progress))
    found = mmbench.write(work_dir, answered)
    unread = sum(not each.letter for each in answered)
    if unread:
        answers = count(
            unread, "answer chooses no option and counts", "answers choose no option and count"
        )
        typer.echo(f"Note: {answers} as wrong.", err=True)
    for name, share in found.items():
        typer.echo(f"{name:<40} {share:7.2%}")
    typer.echo(f"Wrote {work_dir / 'mmbench_result.xlsx'}")
