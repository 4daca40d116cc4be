"""The definition of a dataset format, and shared functions to read fields.

A format converts a row of a data file to a `Conversation` or a `Text`. It does not modify texts,
including white space. Rows that it cannot read raise `RowError`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from xtuner.errors import DataError
from xtuner.types import Conversation, Message, Record, Row

_FILL_IN = "fill it in or remove the row"


class RowError(DataError):
    """A row cannot be read.

    Attributes:
        field: The faulty part of the row, such as ``messages[1].role``; empty for the row itself.
        problem: The problem.
        hint: How to fix it; may be empty.
    """

    def __init__(self, field: str, problem: str, hint: str = "") -> None:
        # Passing all three to the base class keeps the error picklable.
        super().__init__(field, problem, hint)
        self.field = field
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        return f"{where}{self.problem}{f'; {self.hint}' if self.hint else ''}"


@dataclass(frozen=True)
class Format:
    """The structure of the rows of a data set.

    Attributes:
        name: The value of the setting `dataset_format`.
        description: One line.
        columns: Required columns.
        example: An example row.
        convert: Converts a row; raises `RowError`.
        optional: Optional columns.
        aliases: Alternative names of required columns.
        priority: Among formats that use the same number of columns, 'auto' prefers the highest.
        by_row: Another format has the same columns, so 'auto' selects this one only if it can read
            a row, and recognises it.
        recognise: Whether a row is of this format rather than another with the same columns, by
            what its text contains; 'auto' then selects this one.
        renames: Columns of the file with other names, and the format's names for them.
        turn_keys: For a column that is a list of turns, the keys of a turn that are read; other
            keys are reported.
        unlisted: Columns that are read, but do not count when 'auto' compares formats.
    """

    name: str
    description: str
    columns: tuple[str, ...]
    example: Row
    convert: Callable[[Row], Record]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    priority: int = 0
    by_row: bool = False
    recognise: Callable[[Row], bool] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    turn_keys: Mapping[str, Collection[str]] = field(default_factory=dict)
    unlisted: tuple[str, ...] = ()

    def missing(self, columns: Collection[str]) -> list[str]:
        """The required columns that are not in `columns`."""
        return [c for c in self.columns if c not in columns and self.aliases.get(c) not in columns]

    def num_used(self, columns: Collection[str]) -> int:
        """Number of `columns` that count when 'auto' compares formats."""
        return len({*self.columns, *self.optional, *self.aliases.values()} & {*columns})

    def unread(self, columns: Collection[str]) -> list[str]:
        """The `columns` that the format does not read; none for a user's own."""
        if not self.columns:
            return []
        read = {*self.columns, *self.optional, *self.aliases.values(), *self.unlisted}
        read = (read - {*self.renames.values()}) | {*self.renames}
        return [column for column in columns if column not in read]


def kind(value: object) -> str:
    """Describe the JSON type of `value`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    kinds = ((str, "text"), (int | float, "a number"), (Mapping, "an object"), (list, "a list"))
    return next((words for type_, words in kinds if isinstance(value, type_)), type(value).__name__)


def text(row: Row, column: str, *, within: str = "") -> str:
    """Read a required string that is not blank.

    Args:
        row: The row, or an object in it.
        column: The key.
        within: The path of `row`, such as ``messages[1].``, for the message.
    """
    if column not in row:
        raise RowError(within + column, "is missing", _FILL_IN)
    value = row[column]
    if value is None:
        raise RowError(within + column, "is null", _FILL_IN)
    if not isinstance(value, str):
        raise RowError(within + column, f"is {kind(value)}", "it must be text")
    if not value.strip():
        raise RowError(within + column, "is empty", _FILL_IN)
    return value


def optional_text(row: Row, column: str, *, within: str = "") -> str:
    """Read an optional string; missing or null is ``""``."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(within + column, f"is {kind(value)}", "it must be text")
    return value


def items(row: Row, column: str, *, within: str = "") -> Sequence[Any]:
    """Read a required list that is not empty."""
    if column not in row:
        raise RowError(within + column, "is missing", _FILL_IN)
    value = row[column]
    if not isinstance(value, list | tuple):
        raise RowError(within + column, f"is {kind(value)}", "it must be a list")
    if not value:
        raise RowError(within + column, "is an empty list", _FILL_IN)
    return value


def objects(values: Sequence[Any], *, within: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Pair each object of a list with its path, such as ``messages[1].``."""
    for i, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise RowError(f"{within}[{i}]", f"is {kind(value)}", "it must be an object")
    return [(f"{within}[{i}].", value) for i, value in enumerate(values)]


def listed(row: Row, column: str) -> Row:
    """`row` with the list in `column` read from its text: tables store lists as JSON, pandas as
    Python."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        return row
    for parse in (json.loads, ast.literal_eval):
        try:
            return {**row, column: parse(value)}
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise RowError(column, "is text that is not a list", "write it as JSON")


def joined(*parts: str) -> str:
    """Join the parts that are not blank with line breaks."""
    return "\n".join(part for part in parts if part.strip())


def exchange(question: str, answer: str, *, system: str = "") -> Conversation:
    """A conversation with one question and one answer."""
    turns = (Message("user", question), Message("assistant", answer))
    return Conversation((*system_turn(system), *turns))


def question_and_answer(
    question: str, answer: str, *, context: str = "", system: str = ""
) -> Callable[[Row], Conversation]:
    """The `convert` of a format whose rows are one question and its answer.

    Args:
        question: The column of the question.
        answer: The column of the answer.
        context: An optional column, whose text follows the question on the next line.
        system: An optional column with the system message.
    """
    return partial(_exchange, question=question, answer=answer, context=context, system=system)


def _exchange(row: Row, *, question: str, answer: str, context: str, system: str) -> Conversation:
    asked = joined(text(row, question), optional_text(row, context) if context else "")
    given = optional_text(row, system) if system else ""
    return exchange(asked, text(row, answer), system=given)


def system_turn(system: str) -> tuple[Message, ...]:
    """The system turn, or no turn if `system` is blank."""
    return (Message("system", system),) if system.strip() else ()


def conversation(
    messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] = (), column: str
) -> Conversation:
    """Make a conversation, which must have assistant turns that are not empty."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError(column, "has no assistant turn", "add one or remove the row")
    if not all(answer.content.strip() or answer.tool_calls for answer in answers):
        raise RowError(column, "has an empty assistant turn", _FILL_IN)
    return Conversation(tuple(messages), tuple(tools))
