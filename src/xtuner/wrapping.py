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
_COMMAND = re.compile(r" *(xtuner|pip|iconv|make) ")
_PIECE = re.compile(
    r" *(?:[^ ]*[/\\=][^ ]*|'[^' ]*'|\"[^\" ]*\"|`[^` ]*`|"
    r"[⺀-鿿가-힣][，。、；：？！）》”’」』,.;:]*|[^ '\"`⺀-鿿가-힣]+|[^ ])"
)
"""What is not broken: a path, a quoted word, a Chinese, Japanese or Korean character with the
punctuation after it, or what is between these."""


def wrapped(text: str, width: int, *, indent: int | None = None) -> str:
    """Break the lines of `text` at spaces so that they fit into `width` columns.

    Words longer than a line, such as paths, are kept whole, and so are lines with a command. Text
    in Chinese, Japanese or Korean also breaks between characters, unless it is part of a path or
    in quotes.

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
    if columns(line) <= width or _COMMAND.match(line):
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
    """`line` in the pieces between which it may break, each with the spaces before it. A piece
    that is next to another one without a space belongs to it, unless it is Chinese, Japanese or
    Korean."""
    held = ""
    for piece in _PIECE.findall(line):
        wide = piece.lstrip() >= "⺀"
        if held and (piece[0] == " " or wide or held.lstrip() >= "⺀"):
            yield held
            held = ""
        held += piece
    if held:
        yield held
