"""Renames the columns of a file, by the setting `columns` or by common names. Only names are
compared. Rows on disk keep their keys; they are renamed before the format reads them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from xtuner.data.formats.base import Format
from xtuner.errors import ConfigError, did_you_mean
from xtuner.types import Record, Row

ROLES = {"user": "question", "assistant": "answer", "system": "system"}
"""Roles in the setting `columns`, and the columns of format 'qa'."""

_QUESTION = (
    "question q query prompt input instruction user human "
    "问题 提问 问 问句 题目 用户 用户输入 用户问题 客户 客户问题 输入 指令"
)  # fmt: skip
_ANSWER = (
    "answer a response reply output completion assistant bot gpt "
    "回答 答案 答 答复 回复 应答 标准答案 参考答案 助手 客服 客服回答 输出"
)  # fmt: skip
_SYSTEM = "system system_prompt 系统 系统提示 系统提示词"
ENDS = ("?", "？", "。", "!", "！")
"""Characters that end a sentence, but not the name of a column."""
_LAYOUTS: tuple[tuple[Mapping[str, str], tuple[str, ...]], ...] = (
    (
        {"instruction": "instruction 指令 任务", "input": "input 输入 补充输入", "output": _ANSWER,
         "system": _SYSTEM},
        ("instruction", "input", "output"),
    ),
    ({"question": _QUESTION, "answer": _ANSWER, "system": _SYSTEM}, ("question", "answer")),
)  # fmt: skip
"""Common names of the columns of a format, and which of its columns are required."""


class Renamed(NamedTuple):
    """Columns under the names that formats use.

    Attributes:
        columns: Of the file, renamed.
        names: The renamed columns of the file, and their new names.
    """

    columns: tuple[str, ...]
    names: dict[str, str]


def chosen(columns: Collection[str], names: Mapping[str, str], known: Collection[str]) -> Renamed:
    """Rename `columns` according to the setting `columns`.

    Args:
        columns: Of the file.
        names: The setting; names that the file lacks are ignored.
        known: The columns that formats read.

    Raises:
        ConfigError: A column gets a name that no format has, or two get the same.
    """
    for column, role in names.items():
        if role not in ROLES and role not in known:
            raise ConfigError(
                f"columns: {column!r} is read as {role!r}, which must be 'user', 'assistant', "
                f"'system', or a column of a format{did_you_mean(role, [*ROLES, *known])}"
            )
    here = {column: ROLES.get(role, role) for column, role in names.items() if column in columns}
    for target in here.values():
        same = [column for column, other in here.items() if other == target]
        if len(same) > 1:
            raise ConfigError(f"columns: {' and '.join(map(repr, same))} are read as the same")
    return _renamed(columns, here)


def by_usual_names(columns: Collection[str], fits: Callable[[tuple[str, ...]], bool]) -> Renamed:
    """Rename columns with common names, if a format fits then.

    Args:
        columns: Those of a file that no format fits.
        fits: Whether a format has such columns.

    Returns:
        The renaming; empty if no format would fit or several columns compete.
    """
    plain = {column: _plain(column) for column in columns}
    for names in _candidates(plain):
        renamed = _renamed(columns, {c: n for c, n in names.items() if c != n})
        if fits(renamed.columns):
            return renamed
    return Renamed(tuple(columns), {})


def with_names(format: Format, names: Mapping[str, str]) -> Format:
    """`format`, reading renamed columns."""
    if not names:
        return format
    return replace(format, convert=partial(_convert, format.convert, dict(names)), renames=names)


def advice(columns: Collection[str]) -> str:
    """Advice if no format fits."""
    if any(len(column) > 40 or column.strip()[-1:] in ENDS for column in columns if column):
        return (
            "The first line of a table must have the names of its columns, but this one looks "
            "like data: put a line such as question,answer before it."
        )
    if len(columns) == 1 and (sign := re.search("[，；]", next(iter(columns)))):
        return (
            f"The columns are separated by the full-width character {sign[0]}: write "
            f"{',' if sign[0] == '，' else ';'} in every line."
        )
    first, second = [*columns][:2] if len(columns) > 1 else ("COLUMN", "OTHER_COLUMN")
    return (
        f"Assign roles to the columns: columns = {{{first!r}: 'user', {second!r}: 'assistant'}}, "
        "or rename them in the file to 'question' and 'answer'."
    )


def _candidates(plain: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Renamings to try, in order: other case and spaces, then common names."""
    if len({*plain.values()}) == len(plain):
        yield dict(plain)
    for layout, required in _LAYOUTS:
        found = {
            target: [column for column, name in plain.items() if name in words.split()]
            for target, words in layout.items()
        }
        if all(len(found[target]) == 1 for target in required):
            yield {names[0]: target for target, names in found.items() if len(names) == 1}


def _plain(column: str) -> str:
    """`column` in normal form: without case, spaces, and a colon or number after it."""
    return re.sub(r"[\s_-]+", "_", column.strip().strip(":：").casefold()).strip("_")


def _renamed(columns: Collection[str], names: Mapping[str, str]) -> Renamed:
    replaced = {*names.values()}
    kept = (c for c in columns if c in names or c not in replaced)
    return Renamed(tuple(names.get(column, column) for column in kept), dict(names))


def _convert(convert: Callable[[Row], Record], names: Mapping[str, str], row: Row) -> Record:
    replaced = {*names.values()}
    kept = {c: v for c, v in row.items() if c not in names and c not in replaced}
    return convert({**kept, **{name: row[c] for c, name in names.items() if c in row}})
