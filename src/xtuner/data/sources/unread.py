"""Report what a format does not read of a file, before training.

Data for another purpose (preference pairs, good and bad answers, audio, video) often also have the
columns of a format. As conversations they teach something else, so 'auto' rejects them; a format
that is set by name reads its columns, and the others are noted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence

from xtuner.data.formats.base import Format
from xtuner.types import Row

_HARMLESS = re.compile(
    r"_?id|.*_id|uuid|uid|guid|idx|index|hash|sha\d*|source|src|origin|dataset\w*|file\w*|path|split"
    r"|url|link|author|created\w*|updated\w*|date\w*|time\w*|lang\w*|categor\w+|topics?|domain|tags?"
    r"|license|meta|metadata|num_\w+|n_\w+|\w*length|\w*tokens|__index_level_\d+__|Unnamed: \d+",
    re.IGNORECASE,
)
"""Names of metadata columns, which contain nothing to learn."""

_LABELS = ("label", "kto_tag")
_VERDICTS = {"true", "false", "good", "bad", "desirable", "undesirable"}
_CONVERSATIONS = ({"messages"}, {"conversations"}, {"prompt", "completion"})
_NUMBERS = ({"0", "1"}, {"-1", "1"}, {"0.0", "1.0"}, {"-1.0", "1.0"})
_MEDIA = {"audio": "audio", "audios": "audio", "video": "video", "videos": "video"}
_MEDIA_TOKEN = re.compile(r"<(audio|video)>")
_BLANKS = re.compile(r"\{\{\s*\w+\s*\}\}")
_MOST_NAMES = 8
_BOTH = ("chosen", "rejected")


def other_kind(rows: Sequence[Row], unread: Sequence[str]) -> str:
    """A description of the file, if columns that are not read make it data of another kind;
    otherwise empty.

    Args:
        rows: The first rows of the file.
        unread: Columns that the format does not read.
    """
    if all(column in unread for column in _BOTH):
        return (
            "the columns 'chosen' and 'rejected' make these preference pairs, which an algorithm "
            "such as DPO learns from"
        )
    for column in _LABELS:
        if column in unread and _is_label(column, rows):
            return (
                f"the column {column!r} says which answers are good and which are bad, which an "
                "algorithm such as KTO learns from; as conversations, bad answers would be learned "
                "like good ones"
            )
    for column, kind in _MEDIA.items():
        if column in unread and any(row.get(column) for row in rows):
            return f"the column {column!r} holds {kind}; xtuner trains on text and images"
    return ""


def encoded_already(columns: Sequence[str]) -> str:
    """A description of a file of token ids; empty if it is none."""
    if "input_ids" not in columns:
        return ""
    return (
        "the column 'input_ids' holds token ids of an unknown tokenizer; give "
        "the text or messages from which they were made"
    )


def notes(format: Format, rows: Sequence[Row], unread: Sequence[str]) -> Iterator[str]:
    """Yield a note for everything in `rows` that the format ignores or takes literally."""
    if columns := [name for name in unread if not _HARMLESS.fullmatch(name)]:
        several = len(columns) > 1
        yield f"the column{'s' * several} {_quoted(columns)} {_are(several)} not read"
    if keys := list(_unread_keys(format, rows)):
        several = len(keys) > 1
        yield f"the key{'s' * several} {_quoted(keys)} of turns {_are(several)} not read"
    text = "\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    if found := _MEDIA_TOKEN.search(text):
        yield f"{found[0]} in a text is trained on as plain text; xtuner does not read {found[1]}"
    if found := _BLANKS.search(text):
        yield f"{found[0]} in a text is not replaced by anything, and is trained on literally"


def _unread_keys(format: Format, rows: Sequence[Row]) -> Iterator[str]:
    seen: set[str] = set()
    for column, read in format.turn_keys.items():
        for row in rows:
            value = row.get(column)
            for turn in value if isinstance(value, list | tuple) else ():
                for key in turn if isinstance(turn, Mapping) else ():
                    new = key not in seen and turn[key] not in (None, "", [], {})
                    if new and key not in read and not _HARMLESS.fullmatch(key):
                        seen.add(key)
                        yield key


def _is_label(column: str, rows: Sequence[Row]) -> bool:
    """Whether `column` says if an answer is good: true or false in every row. Next to conversations
    it may also be words, or both of two numbers, which elsewhere are classes of texts.
    """
    values = [row[column] for row in rows if row.get(column) is not None]
    given = {str(value).strip().lower() for value in values} - {""}
    if not given or given <= {"true", "false"}:
        return bool(given)
    names = {name for row in rows for name in row}
    answers = any(names >= columns for columns in _CONVERSATIONS)
    return answers and (given <= _VERDICTS or given in _NUMBERS)


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:_MOST_NAMES]))
    more = len(names) - _MOST_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _are(several: bool) -> str:
    return "are" if several else "is"
