"""Evaluate the tool calls of a model on conversations; see `xtuner.tools.evaluation`.

data ──read──► conversations ──hold_out──► questions ──answer──► outcomes ──table──► lines
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from xtuner.calls.check import CallPolicy, Problem
from xtuner.chat.session import Session
from xtuner.config.schema import Settings
from xtuner.data.formats.base import RowError
from xtuner.data.sources.resolve import prepare
from xtuner.data.sources.rows import Fault
from xtuner.errors import DataError, count
from xtuner.generation.batch import generate_batch
from xtuner.tools import evaluation as ev
from xtuner.types import Conversation

Located = tuple[str, Conversation]
"""The location of a row, and its conversation."""
_ROWS = (
    ("turns with a call", "num_calls"),
    ("  right function", "right_function"),
    ("  right arguments", "right_arguments"),
    ("  valid JSON", "valid_json"),
    ("  missing calls", "missing"),
    ("turns without a call", "num_answers"),
    ("  needless calls", "needless"),
)


def read(data: str, dataset_format: str, *, note: Callable[[str], None]) -> Iterator[Located]:
    """Yield the usable conversations of `data`; `note` gets a line about the others.

    Raises:
        DataError: The data cannot be read.
    """
    settings = Settings(
        pretrained_model_name_or_path="", data_path=(data,), dataset_format=(dataset_format,)
    )
    lost: list[str] = []
    policy = CallPolicy()
    for source in prepare(settings, folder=Path.cwd()):
        for task in source.tasks():
            where = source.location(task.file, task.row.line)
            record: Any = (row := task.row.parsed())
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
        note(f"Note: {count(len(lost), 'row')} cannot be used; the first: {lost[0]}")


def hold_out(
    records: Sequence[Located], folder: Path, share: float, *, note: Callable[[str], None]
) -> list[Located]:
    """Split `records` by tool, write both parts to `folder`, and return the held-out one.

    Raises:
        DataError: Fewer than two tools are called.
    """
    names = ev.called_tools(record for _, record in records)
    if len(names) < 2:
        raise DataError(f"--split: needs data that call at least 2 tools; these call {len(names)}")
    chosen = ev.held_out_tools(names, share)
    train, held = ev.split_by_tool([record for _, record in records], chosen)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("held_out", held)):
        lines = [json.dumps(ev.as_openai_row(r), ensure_ascii=False) + "\n" for r in part]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    note(
        f"Held out {len(chosen)} of {len(names)} tools ({', '.join(sorted(chosen))}): "
        f"{count(len(train), 'conversation')} in {folder / 'train.jsonl'}, {len(held)} in "
        f"{folder / 'held_out.jsonl'}"
    )
    return [(where, r) for where, r in records if ev.called_tools([r]) & chosen]


def answer(
    session: Session,
    questions: Sequence[ev.Question],
    *,
    batch_size: int,
    progress: Callable[[int], None],
) -> Iterator[ev.Outcome]:
    """Generate the answers in batches of similar length, and compare them.

    Args:
        session: A session with a model whose template has a tool family.
        questions: The result of `tools.evaluation.questions_of`.
        batch_size: Number of answers generated at the same time.
        progress: Called with the number of answers so far.
    """
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
        progress(start + len(part))
        for question, text in zip(part, texts, strict=True):
            yield ev.outcome_of(question, text, family)


def table(outcomes: Sequence[ev.Outcome], seen: set[str] | None) -> Iterator[str]:
    """The shares as lines; with `seen`, also for tools of the training data and for others."""
    columns = {"all": ev.Shares.of(outcomes)}
    if seen is not None:
        known = [each for each in outcomes if each.question.names <= seen]
        new = [each for each in outcomes if not each.question.names <= seen]
        columns |= {"seen tools": ev.Shares.of(known), "held-out tools": ev.Shares.of(new)}
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
