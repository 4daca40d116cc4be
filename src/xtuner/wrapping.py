"""Wrap lines for a terminal: between words, with paths and commands in one piece."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_NARROW = 40
"""A narrower terminal breaks lines itself."""
_INDENT = 4
"""Further lines are indented by this more than the first."""
_LABEL = re.compile(r"[A-Z][a-z]+ {2,}")
XTUNER_COMMANDS = (
    "chat", "check-custom-dataset", "convert", "copy-cfg", "evaluate-tools", "explain", "fetch",
    "list-cfg", "list-dataset-format", "log-dataset", "migrate-cfg", "mmbench", "report", "serve",
    "test", "train", "web",
)  # fmt: skip
_A_COMMAND = (
    rf"(?:xtuner (?:{'|'.join(XTUNER_COMMANDS)})|pip install|hf upload|iconv -f|srun --)(?![\w-])"
)
_COMMAND_LINE = re.compile(rf" *{_A_COMMAND}")
_COMMAND_AT_END = re.compile(rf"(?<=[:：]) *{_A_COMMAND}")
_WIDE = "⺀-鿿가-힣"
_ENDS = "，、。；：？！"
_CLOSING = "）》”’」』"
_WHOLE = "|".join(
    [
        r"`[^`]*`",
        rf"\({_A_COMMAND}[^()]*\)",
        r"(?<![A-Za-z0-9'])'(?:[^' /\\]*'|[^'/\\]*[/\\][^']*')(?![A-Za-z0-9])",
        r'(?<![A-Za-z0-9"])"(?:[^" /\\]*"|[^"/\\]*[/\\][^"]*")(?![A-Za-z0-9])',
    ]
)
"""What is in backticks, a command in brackets, a quoted word, or a quoted path, which may contain
spaces."""
_WORD = re.compile(rf" *(?:(?:{_WHOLE}|[^ {_ENDS}])+[{_ENDS}{_CLOSING}]*|[{_ENDS}]+)| +")
_PIECE = re.compile(rf" *(?:{_WHOLE}|[{_WIDE}][{_ENDS}{_CLOSING},.;:]*|[^ '\"`{_WIDE}]+|[^ ])| +")
"""What is not broken in a word with Chinese, Japanese or Korean: one such character with the
punctuation after it, what is in quotes, or what is between these."""


def wrapped(text: str, width: int, *, indent: int | None = None) -> str:
    """Break the lines of `text` at spaces so that they fit into `width` columns.

    Words longer than a line, such as paths, are kept whole, and so are commands: a line that is
    one, what follows a colon and is one, and what is in backticks. Text in Chinese, Japanese or
    Korean also breaks between characters, unless it is part of a path or in quotes.

    Args:
        indent: The spaces before further lines; None: aligned with the text after a label, or
            indented by four more than the first.
    """
    if width < _NARROW:
        return text
    return "\n".join(_wrapped(line, width, indent) for line in text.split("\n"))


def columns(text: str) -> int:
    """The columns that `text` takes in a terminal; a Chinese character takes two."""
    return sum(map(_columns, text))


def _columns(sign: str) -> int:
    if sign < "\u0300":
        return 1
    if unicodedata.combining(sign) or unicodedata.category(sign) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def _wrapped(line: str, width: int, indent: int | None) -> str:
    if columns(line) <= width or _COMMAND_LINE.match(line):
        return line
    if indent is None:
        label = _LABEL.match(line)
        indent = label.end() if label else len(line) - len(line.lstrip()) + _INDENT
    lines, used = [""], 0
    for piece in _pieces(line.rstrip()):
        needed = columns(piece)
        if used + needed > width and lines[-1].strip():
            piece = piece.lstrip()
            lines.append(" " * indent)
            used, needed = indent, columns(piece)
        lines[-1] += piece
        used += needed
    return "\n".join(lines)


def _pieces(line: str) -> Iterator[str]:
    """`line` in the pieces between which it may break, each with the spaces before it."""
    command = _COMMAND_AT_END.search(line)
    for word in _WORD.findall(line[: command.start()] if command else line):
        if any(sign in word for sign in "/\\=") or word.isascii():
            yield word
        else:
            yield from _pieces_of_word(word)
    if command:
        yield line[command.start() :]


def _pieces_of_word(word: str) -> Iterator[str]:
    """A piece that is next to another one belongs to it, unless it is Chinese, Japanese or
    Korean."""
    held = ""
    for piece in _PIECE.findall(word):
        wide = piece.lstrip() >= "⺀"
        if held.strip() and (wide or held.lstrip() >= "⺀"):
            yield held
            held = ""
        held += piece
    if held:
        yield held
