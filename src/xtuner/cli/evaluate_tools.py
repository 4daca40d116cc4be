"""`xtuner evaluate-tools`."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from xtuner.cli import _model


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Anything that `xtuner chat` accepts.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Conversations with tools: a file, a folder, or a hub name."
        ),
    ],
    dataset_format: Annotated[
        str, typer.Option(metavar="F", help="Dataset format, as in a settings file.")
    ] = "auto",
    train_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="The training data: also report the shares separately for the tools that it "
            "calls and for the others (held-out tools).",
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Split DATA by tool first: DIR/train.jsonl neither calls nor shows the held-out "
            "tools, DIR/held_out.jsonl has the conversations that call them and is evaluated.",
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(min=0.01, max=0.99, help="Share of the tools that --split holds out.")
    ] = 0.2,
    num: Annotated[
        int | None, typer.Option("-n", "--num", min=1, help="Use the first N conversations.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write every answer to this JSONL file.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Maximum number of answers generated at the same time.")
    ] = 16,
    max_new_tokens: _model.MaxNewTokens = 256,
    adapter: _model.Adapter = None,
    prompt_template: _model.PromptTemplate = None,
    system: _model.System = None,
    bits: _model.Bits = None,
    device: _model.DeviceOption = _model.Device.auto,
    dtype: _model.DtypeOption = _model.Dtype.auto,
    trust_remote_code: _model.TrustRemoteCode = False,
    trust_code: _model.TrustCode = False,
) -> None:
    """Measure how well a model calls tools.

    Generates every assistant turn of DATA, greedily, and compares its calls with those of DATA.
    Prints the shares of turns with the right function, the right arguments and valid JSON, and of
    missing and needless calls.
    """
    from xtuner.chat import tool_evaluation
    from xtuner.chat.opening import open_chat
    from xtuner.errors import DataError, ModelError
    from xtuner.generation.generate import GenerationOptions
    from xtuner.tools import evaluation as ev

    note = functools.partial(typer.echo, err=True)
    records = list(tool_evaluation.read(data, dataset_format, note=note))[:num]
    if split is not None:
        records = tool_evaluation.hold_out(records, split, held_out, note=typer.echo)
    questions = [q for where, record in records for q in ev.questions_of(record, where=where)]
    if not any(question.expected for question in questions):
        raise DataError(f"{data}: no assistant turn calls a tool, so there is nothing to measure")
    seen = None
    if train_data is not None:
        train = tool_evaluation.read(train_data, "auto", note=note)
        seen = ev.called_tools(record for _, record in train)
    session = open_chat(
        model,
        adapter=adapter,
        prompt_template=prompt_template,
        system=system,
        bits=bits,
        options=GenerationOptions(max_new_tokens=max_new_tokens),
        device=device.value,
        dtype=dtype.value,
        trust_remote_code=trust_remote_code,
        trust_code=trust_code,
    )
    if session.template.tool_family is None:
        raise ModelError(
            "how this model writes tool calls is not known; use a named template: --prompt-template"
        )
    progress = functools.partial(_show_progress, of=len(questions))
    outcomes = list(
        tool_evaluation.answer(session, questions, batch_size=batch_size, progress=progress)
    )
    if out is not None:
        lines = [json.dumps(each.as_row(), ensure_ascii=False) + "\n" for each in outcomes]
        out.write_text("".join(lines), encoding="utf-8")
    for line in tool_evaluation.table(outcomes, seen):
        typer.echo(line)


def _show_progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        line = f"\r{done} of {of} answers" if done < of else "\r" + " " * 40 + "\r"
        typer.echo(line, err=True, nl=False)
