"""`xtuner evaluate-tools`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xtuner.cli import _model

if TYPE_CHECKING:
    from xtuner.chat.session import Session
    from xtuner.tools.evaluation import Outcome, Question
    from xtuner.types import Conversation

Located = tuple[str, "Conversation"]
_ROWS = (
    ("turns with a call", "num_calls"),
    ("  right function", "right_function"),
    ("  right arguments", "right_arguments"),
    ("  valid JSON", "valid_json"),
    ("  missing calls", "missing"),
    ("turns without a call", "num_answers"),
    ("  needless calls", "needless"),
)


def command(
    model: Annotated[str, typer.Argument(help="What `xtuner chat` takes.")],
    data: Annotated[
        str, typer.Argument(help="Conversations with tools: a file, a folder, or a hub name.")
    ],
    dataset_format: Annotated[
        str, typer.Option(metavar="F", help="As in a settings file.")
    ] = "auto",
    train_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="The training data: shares are also given for the tools that these call, and for "
            "the others (held-out tools).",
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
    batch_size: Annotated[int, typer.Option(min=1, help="Answers generated at a time.")] = 16,
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
    from xtuner.errors import DataError, ModelError
    from xtuner.generation.generate import GenerationOptions
    from xtuner.tools import evaluation as ev

    records = list(_records(data, dataset_format))[:num]
    if split is not None:
        records = _written_split(records, split, held_out)
    questions = [q for where, record in records for q in ev.questions_of(record, where=where)]
    if not any(question.expected for question in questions):
        raise DataError(f"{data}: no assistant turn calls a tool, so there is nothing to measure")
    seen = None
    if train_data is not None:
        seen = ev.called_tools(record for _, record in _records(train_data, "auto"))

    from xtuner.chat.opening import open_chat

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
    outcomes = list(_answered(session, questions, batch_size))
    if out is not None:
        lines = [json.dumps(each.as_row(), ensure_ascii=False) + "\n" for each in outcomes]
        out.write_text("".join(lines), encoding="utf-8")
    for line in table(outcomes, seen):
        typer.echo(line)


def _records(data: str, dataset_format: str) -> Iterator[Located]:
    """The usable conversations of `data`; others are counted on stderr."""
    from xtuner.calls.check import CallPolicy, Problem
    from xtuner.config.schema import Settings
    from xtuner.data.formats.base import RowError
    from xtuner.data.sources.resolve import prepare
    from xtuner.data.sources.rows import Fault, parse
    from xtuner.types import Conversation

    settings = Settings(
        pretrained_model_name_or_path="", data_path=(data,), dataset_format=(dataset_format,)
    )
    lost: list[str] = []
    policy = CallPolicy()
    for source in prepare(settings, folder=Path.cwd()):
        for task in source.tasks():
            where = source.location(task.file, task.row.line)
            row = parse(task.row.value) if isinstance(task.row.value, bytes) else task.row.value
            record: Any = row
            if not isinstance(row, Fault):
                try:
                    record = policy.applied(source.formats[task.file].convert(row))
                except RowError as error:
                    record = error
            if isinstance(record, Fault | Problem | RowError):
                lost.append(f"{where}: {record}")
            elif isinstance(record, Conversation):
                yield where, record
    if lost:
        typer.echo(f"Note: {len(lost)} rows cannot be used; the first: {lost[0]}", err=True)


def _written_split(records: Sequence[Located], folder: Path, share: float) -> list[Located]:
    """Write both parts of `records` to `folder`, and return the held-out one."""
    from xtuner.errors import DataError
    from xtuner.tools import evaluation as ev

    names = ev.called_tools(record for _, record in records)
    if len(names) < 2:
        raise DataError(f"--split: needs data that call at least 2 tools; these call {len(names)}")
    chosen = ev.held_out_tools(names, share)
    train, held = ev.split_by_tool([record for _, record in records], chosen)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held_out", held)):
        lines = [json.dumps(ev.as_openai_row(r), ensure_ascii=False) + "\n" for r in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    typer.echo(
        f"Held out {len(chosen)} of {len(names)} tools ({', '.join(sorted(chosen))}): "
        f"{len(train)} conversations in {folder / 'train.jsonl'}, {len(held)} in "
        f"{folder / 'held_out.jsonl'}"
    )
    return [(where, r) for where, r in records if ev.called_tools([r]) & chosen]


def _answered(
    session: Session, questions: Sequence[Question], batch_size: int
) -> Iterator[Outcome]:
    """Generate the answers in batches of similar length, and compare them."""
    from xtuner.generation.batch import generate_batch
    from xtuner.tools.evaluation import outcome_of

    family = session.template.tool_family
    assert family is not None
    ordered = sorted(questions, key=lambda q: sum(len(m.content) for m in q.messages))
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        texts = generate_batch(
            session.model,
            session.tokenizer,
            template=session.template,
            conversations=[question.messages for question in part],
            tools=[question.tools for question in part],
            options=session.options,
        )
        if sys.stderr.isatty():
            typer.echo(f"\r{start + len(part)} of {len(ordered)} answers", err=True, nl=False)
        for question, text in zip(part, texts, strict=True):
            yield outcome_of(question, text, family)
    if sys.stderr.isatty():
        typer.echo("\r" + " " * 40 + "\r", err=True, nl=False)


def table(outcomes: Sequence[Outcome], seen: set[str] | None) -> Iterator[str]:
    """The shares as lines; with `seen`, for tools of the training data and others too."""
    from xtuner.tools.evaluation import Shares

    columns = {"all": Shares.of(outcomes)}
    if seen is not None:
        known = [each for each in outcomes if each.question.names <= seen]
        new = [each for each in outcomes if not each.question.names <= seen]
        columns |= {"seen tools": Shares.of(known), "held-out tools": Shares.of(new)}
    widths = [max(8, len(name) + 2) for name in columns]
    pairs = list(zip(columns.items(), widths, strict=True))
    yield " " * 22 + "".join(f"{name:>{width}}" for (name, _), width in pairs)
    for label, field in _ROWS:
        cells = "".join(f"{_cell(getattr(s, field)):>{width}}" for (_, s), width in pairs)
        yield f"{label:<22}{cells}"


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.0f} %"
